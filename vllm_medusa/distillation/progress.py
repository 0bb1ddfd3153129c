"""The progress bar of a target that answers prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from vllm_medusa.distillation.dialogue import Answer, Dialogue


class TokenRateColumn(TextColumn):
    """Tokens that were emitted, per second since the first dialogue began."""

    def render(self, task: Task) -> Text:
        """Say so; nothing before the first answer."""
        tokens, elapsed = task.fields["tokens"], task.elapsed
        return Text(f"{tokens / elapsed:.0f} tokens/s" if tokens and elapsed else "")


class GenerationProgress:
    """Tells the progress bar what is done."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._tokens = 0

    def answered(self, dialogue: Dialogue, answer: Answer) -> None:
        """Count an answer's tokens, and its dialogue if it is over."""
        self._tokens += answer.num_tokens
        self._progress.update(self._task, advance=0 if dialogue.is_open else 1, tokens=self._tokens)

    def reach(self, prompts: int) -> None:
        """Show that all of the first so many prompts are done, be it in an earlier run."""
        self._progress.update(self._task, completed=prompts)


@contextmanager
def generation_progress(title: str, prompts: int, visible: bool = True) -> Iterator[GenerationProgress]:
    """Show a progress bar with the tokens per second while prompts are answered."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TokenRateColumn(""),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not visible) as progress:
        yield GenerationProgress(progress, progress.add_task(title, total=prompts, tokens=0))
