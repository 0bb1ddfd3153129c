# SPDX-License-Identifier: Apache-2.0
"""Show the race: answers that grow side by side on a terminal, elsewhere lines of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_medusa.demo.contenders import TITLES
from vllm_medusa.demo.engine import Decoded
from vllm_medusa.demo.questions import Question
from vllm_medusa.demo.race import TURN, Watch
from vllm_medusa.progress import progress

ANSWER_LINES = 14
RULES = (
    f"The engines take turns of {TURN:g} s: one decodes while the others and this display stand still. "
    "Tokens per second count an engine's own time."
)

TextOf = Callable[[list[int]], str]
"""Returns the text of an answer's token ids."""


@contextmanager
def shown(
    questions: Sequence[Question], names: Sequence[str], text_of: TextOf, console: Console | None = None
) -> Iterator[Watch]:
    """Yield what shows the race, turn by turn.

    Args:
        questions: the questions; their numbers count from 0.
        names: the contenders that race, from left to right.
        text_of: the tokenizer's decoding.
        console: where answers are shown if it is a terminal. Default: standard output.

    """
    terminal = console or Console()
    if terminal.is_terminal:
        with Live(console=terminal, auto_refresh=False) as live:

            def draw(number: int, states: Mapping[str, Decoded]) -> None:
                frame = race_frame(
                    number, questions, {name: states.get(name) for name in names}, text_of, terminal.width
                )
                live.update(frame, refresh=True)

            yield draw
    else:
        with progress("Taking turns, questions", len(questions)) as counted:

            def count(number: int, states: Mapping[str, Decoded]) -> None:
                if states.keys() == set(names) and all(state.finished for state in states.values()):
                    counted.advance(tokens=sum(len(state.texts[0]) for state in states.values()))

            yield count


def race_frame(
    number: int,
    questions: Sequence[Question],
    states: Mapping[str, Decoded | None],
    text_of: TextOf,
    width: int,
) -> RenderableType:
    """Return the picture of one moment; a contender that has not begun has None."""
    question = questions[number]
    title = Text(f"{number + 1} of {len(questions)}, {question.category}: ", style="bold")
    title.append(question.turns[0], style="not bold")
    columns = Table.grid(expand=True)
    for _ in states:
        columns.add_column(ratio=1)
    inner = max(width // len(states) - 4, 1)  # The panel's border and padding.
    columns.add_row(*(_panel(name, state, text_of, inner) for name, state in states.items()))
    return Group(title, columns, Text(RULES, style="dim"))


def _panel(name: str, state: Decoded | None, text_of: TextOf, width: int) -> Panel:
    text = Text(text_of(state.texts[0]) if state else "")
    lines = text.wrap(Console(width=width), width)
    style = "green" if state and state.finished else "default"
    body = Text("\n").join(lines[-ANSWER_LINES:])
    return Panel(body, title=TITLES[name], subtitle=_speed(state), height=ANSWER_LINES + 2, border_style=style)


def _speed(state: Decoded | None) -> str:
    """Return the tokens per second behind an answer's first token, and its tokens per step."""
    if state is None or state.seconds == 0:
        return ""
    per_step = f", {state.tokens_per_step:.2f} a step" if state.drafted else ""
    return f"{(len(state.texts[0]) - 1) / state.seconds:.1f} tokens/s{per_step}"
