# SPDX-License-Identifier: Apache-2.0
"""The race: engines answer the same questions in short turns, so that all meet the same machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vllm_medusa.demo.contenders import TREE_WIDE, plugins
from vllm_medusa.demo.engine import WARM_UP_TOKENS, Decoded, Engine, ExactRun, Order, serve
from vllm_medusa.demo.process import Contender, share_environment, take_turns
from vllm_medusa.progress import track

TURN = 0.25
"""Seconds of a turn: long against what changing engines takes, short enough to see all answers grow."""

Watch = Callable[[int, Mapping[str, Decoded]], None]
"""Called after each turn with the question's number and how far the contenders that have begun it are."""


@dataclass(frozen=True)
class Race:
    """Who answers what.

    Attributes:
        target: the target's directory.
        dtype: the dtype of the timed engines.
        configs: each contender's ``--speculative-config``; the first contender is plain vLLM.
        prompts: token ids of each question's prompt.
        wide_asked: numbers of the questions that the wide tree answers.
        tokens: most tokens of an answer.
        stop: tokens that end an answer.
        threads: threads of each engine; only one engine works at a time.

    """

    target: Path
    dtype: str
    configs: dict[str, dict[str, Any] | None]
    prompts: list[list[int]]
    wide_asked: list[int]
    tokens: int
    stop: tuple[int, ...]
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    @property
    def is_exact(self) -> bool:
        """Whether the timed engines' own texts are in fp32, in which no rounding lets texts differ."""
        return self.dtype == "float32"

    def asked(self, name: str) -> list[int]:
        """Return the numbers of the questions that a contender answers."""
        return self.wide_asked if name == TREE_WIDE else list(range(len(self.prompts)))

    def order(self, number: int, turn: float = TURN) -> Order:
        return Order([self.prompts[number]], self.tokens, self.stop, turn)

    def start(self, name: str, logs: Path) -> Contender:
        """Start a contender's process with its log in ``logs``."""
        timed, exact = (Engine(str(self.target), dtype, self.configs[name]) for dtype in (self.dtype, "float32"))
        prompts = [self.prompts[number] for number in self.asked(name)]
        exact_run = None if self.is_exact else ExactRun(exact, Order(prompts, self.tokens, self.stop))
        return Contender(name, serve, (timed, self.threads, exact_run), plugins(name), logs / f"{name}.log")


@dataclass(frozen=True)
class Run:
    """One contender's run, by the questions' numbers.

    Attributes:
        answers: the timed answers.
        exact: the token ids of the answers in fp32.

    """

    answers: dict[int, Decoded] = field(default_factory=dict)
    exact: dict[int, list[int]] = field(default_factory=dict)


def run_race(race: Race, logs: Path, watching: Callable[[], Any]) -> dict[str, Run]:
    """Let the contenders answer.

    Args:
        race: who answers what.
        logs: the directory of the contenders' logs.
        watching: returns a context manager that gives the ``Watch`` of the race, once all engines are warm.

    Returns:
        Each contender's run.

    """
    share_environment()
    runs = {name: Run() for name in race.configs}
    with ExitStack() as stack:
        contenders = [stack.enter_context(race.start(name, logs)) for name in race.configs]
        title = "Starting engines" if race.is_exact else "Starting engines, answering in fp32"
        for contender in track(contenders, title):
            if not race.is_exact:
                texts = contender.answer().texts
                runs[contender.name].exact.update(zip(race.asked(contender.name), texts, strict=True))
            contender.answer()
        for contender in track(contenders, "Warming up"):
            contender.ask(Order(race.prompts[:1], WARM_UP_TOKENS))
        racing = [contender for contender in contenders if contender.name != TREE_WIDE]
        with watching() as watch:
            for number in range(len(race.prompts)):
                states = take_turns(racing, race.order(number), partial(watch, number))
                for contender in contenders:
                    if contender not in racing and number in race.asked(contender.name):
                        states |= take_turns([contender], race.order(number))
                for name, decoded in states.items():
                    runs[name].answers[number] = decoded
                    if race.is_exact:
                        runs[name].exact[number] = decoded.texts[0]
    return runs


def first_of_each(kinds: Sequence[str], count: int) -> list[int]:
    """Return the numbers of the first ``count`` questions of each kind."""
    seen: dict[str, int] = {}
    chosen = []
    for number, kind in enumerate(kinds):
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= count:
            chosen.append(number)
    return chosen
