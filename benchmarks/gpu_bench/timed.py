# SPDX-License-Identifier: Apache-2.0
"""What rounds in turns say."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_bench.engines import Decoded
from gpu_bench.launches import Launches
from gpu_bench.lines import Goal, Line
from gpu_bench.lineup import Entered, Entrant, Part, Setting
from gpu_bench.roofline import Floor

STEP_GOAL = Goal(most=1.08)
GRAPHS_GOAL = Goal(most=1)
OUTSIDE_GOAL = Goal(most=5)


@dataclass(frozen=True, eq=False)
class Timed:
    """What an engine's rounds and plain decoding's say, taken in turns."""

    setting: Setting
    requests: int
    entered: Entered
    plain_rounds: Sequence[Decoded]
    rounds: Sequence[Decoded]

    @property
    def ratio(self) -> float:
        """What a step costs, in plain steps: the median of the rounds' ratios."""
        return statistics.median(
            own.seconds / own.steps / (plain.seconds / plain.steps)
            for own, plain in zip(self.rounds, self.plain_rounds, strict=True)
        )

    @property
    def tokens_per_step(self) -> float:
        """What a request emits in a step."""
        return sum(each.tokens for each in self.rounds) / sum(each.steps for each in self.rounds) / self.requests

    @property
    def speedup(self) -> float:
        """Tokens per second, in plain decoding's: the median of the rounds' ratios."""
        return statistics.median(
            _tokens_per_second(own) / _tokens_per_second(plain)
            for own, plain in zip(self.rounds, self.plain_rounds, strict=True)
        )

    def step_lines(self) -> Iterator[Line]:
        """Say what a step costs."""
        entrant, floor, details = self.entered.entrant, self._floor(), self._details(self.rounds)
        what = f"{entrant.name}: a step of {self.requests} x {self.entered.tree.rows} rows"
        yield Line.timed(Part.STEP, what, _seconds_per_step(self.rounds), "ms", floor, details=details)
        yield Line(
            Part.STEP,
            f"{what}, in plain steps",
            self.ratio,
            floor=floor.seconds / self._plain_floor().seconds,
            goal=STEP_GOAL if entrant.has_step_goal and self.setting.is_gpu else None,
            details=details,
        )

    def plain_line(self, beside: str) -> Line:
        """Say how fast plain decoding was meanwhile."""
        rate = statistics.median(map(_tokens_per_second, self.plain_rounds))
        note = f"{rate:.0f} tokens/s, beside {beside}"
        return self._race_line("plain", self.plain_rounds, self._plain_floor(), note)

    def race_line(self) -> Line:
        """Say how fast it decodes, or with made-up weights, from how many tokens per step on it is worth its steps."""
        if self.setting.lineup.is_made_up:
            note = f"gains from {self.ratio:.2f} tokens/step on ({self.tokens_per_step:.2f} by made-up weights)"
        else:
            note = f"{self.speedup:.2f} times plain's tokens/s, {self.tokens_per_step:.2f} tokens/step"
        return self._race_line(self.entered.entrant.name, self.rounds, self._floor(), note)

    def _race_line(self, name: str, rounds: Sequence[Decoded], floor: Floor, note: str) -> Line:
        details = {"contender": name, "tokens_per_second": statistics.median(map(_tokens_per_second, rounds))}
        return Line.timed(
            Part.RACE,
            f"{self.requests} at once, {name}",
            _seconds_per_step(rounds),
            "ms",
            floor,
            note=note,
            details=details | self._details(rounds),
        )

    def _floor(self) -> Floor:
        setting, tree, heads = self.setting, self.entered.tree, self.entered.entrant.heads
        assert heads is not None
        step = setting.lineup.target.work(self.requests, tree.rows, setting.sizes.prompt)
        return setting.rates.floor([*step, *heads.sizes.work(self.requests, tree.depth)])

    def _plain_floor(self) -> Floor:
        setting = self.setting
        return setting.rates.floor(setting.lineup.target.work(self.requests, 1, setting.sizes.prompt))

    def _details(self, rounds: Sequence[Decoded]) -> dict[str, Any]:
        details = {"requests": self.requests, "rounds": len(rounds), "made_up": self.setting.lineup.is_made_up}
        if rounds is self.plain_rounds:
            return details
        tree = self.entered.tree
        ratios = {
            "step_in_plain_steps": self.ratio,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second_in_plain": self.speedup,
        }
        return details | ratios | {"rows": tree.rows, "depth": tree.depth}


def _tokens_per_second(decoded: Decoded) -> float:
    return decoded.tokens / decoded.seconds


def _seconds_per_step(rounds: Sequence[Decoded]) -> float:
    return statistics.median(each.seconds / each.steps for each in rounds)


def launch_lines(setting: Setting, entrant: Entrant, launches: Launches) -> Iterator[Line]:
    """Say what the host launches in a step."""
    for name, value, goal in (
        ("graph launches of the proposal", launches.proposal.graphs, GRAPHS_GOAL),
        ("launches of the proposal outside of graphs", launches.proposal.outside, OUTSIDE_GOAL),
        ("graph launches of a step", launches.step.graphs, None),
        ("launches of a step outside of graphs", launches.step.outside, None),
    ):
        yield Line(
            Part.PROPOSAL,
            f"{entrant.name}: {name}",
            value,
            goal=goal if setting.is_gpu else None,
            note="" if setting.is_gpu else "not counted: no CUDA here",
        )


def proposal_line(setting: Setting, entered: Entered, requests: int) -> Line:
    """Time the proposal alone, and say so."""
    heads = entered.entrant.heads
    assert heads is not None
    floor = setting.rates.floor(heads.sizes.work(requests, entered.tree.depth))
    taken = entered.worker.call("proposal_seconds", requests)
    what = f"{entered.entrant.name}: the proposal for {requests}"
    return Line.timed(Part.PROPOSAL, what, taken, "µs", floor, details={"requests": requests})
