# SPDX-License-Identifier: Apache-2.0
"""Answers grow side by side on a terminal; elsewhere there are lines without control characters."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from vllm_medusa.demo.contenders import NATIVE_CHAIN, PLAIN, TREE
from vllm_medusa.demo.display import ANSWER_LINES, race_frame, shown
from vllm_medusa.demo.engine import Decoded
from vllm_medusa.demo.questions import Question

NAMES = (PLAIN, NATIVE_CHAIN, TREE)
QUESTIONS = [
    Question(question_id=number, category=kind, turns=(f"What is {number}?",)) for number, kind in enumerate(["a", "b"])
]


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"word{each}" for each in ids)


def decoded(length: int, accepted: int = 0, finished: bool = False) -> Decoded:
    return Decoded([list(range(length))], 2.0, length - 1 - accepted, 4 * accepted, accepted, finished)


def frame(**states: Decoded | None) -> list[str]:
    console = Console(width=90, height=30)
    with console.capture() as captured:
        console.print(race_frame(1, QUESTIONS, states, text_of, console.width))
    return captured.get().splitlines()


def test_each_contender_has_a_column_with_its_answer_and_its_speed() -> None:
    lines = frame(plain=decoded(3), native_chain=decoded(5, accepted=1), tree=None)
    text = "\n".join(lines)
    assert lines[0].startswith("2 of 2, b: What is 1?")
    titles = next(line for line in lines if "plain vLLM" in line)
    assert titles.index("plain vLLM") < titles.index("vLLM's chain") < titles.index("our tree")
    assert "word2" in text
    assert "1.0 tokens/s ─" in text
    assert "2.0 tokens/s, 1.33 a step" in text
    assert "take turns" in text


def test_of_a_long_answer_the_end_is_shown() -> None:
    lines = frame(plain=decoded(200), native_chain=None, tree=None)
    assert "word199" in "\n".join(lines)
    assert "word0 " not in "\n".join(lines)
    assert len(lines) <= ANSWER_LINES + 6


def test_on_a_terminal_frames_are_drawn() -> None:
    stream = io.StringIO()
    with shown(QUESTIONS, NAMES, text_of, Console(file=stream, force_terminal=True, width=90)) as watch:
        watch(0, {PLAIN: decoded(3)})
        watch(0, {PLAIN: decoded(6, finished=True)})
    assert "word5" in stream.getvalue()


def test_elsewhere_questions_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with shown(QUESTIONS, NAMES, text_of, Console(file=stream)) as watch:
        for number in range(2):
            watch(number, {PLAIN: decoded(3, finished=True)})
            watch(number, {PLAIN: decoded(3, finished=True), NATIVE_CHAIN: decoded(3), TREE: decoded(3)})
            watch(number, {name: decoded(3, finished=True) for name in NAMES})
    assert stream.getvalue() == ""
    printed = capsys.readouterr().err
    assert printed.startswith("Taking turns, questions: 2 of 2")
    assert "\x1b" not in printed
