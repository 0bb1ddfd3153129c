# SPDX-License-Identifier: Apache-2.0
"""Whether the heads are asked at all: they are not where what they say is not worth verifying."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

PATIENCE = 3
"""Drafts in a row of which nothing is verified before the heads pause."""

FIRST_PAUSE, LONGEST_PAUSE = 16, 128
"""Steps; each pause is twice as long as the last one. After the longest ones, asking costs a 128th of its price."""

MARGIN = 0.03
"""By how much speculation has to be faster than plain decoding to begin again, so that it does not come and go."""

FIRST_GAIN = 1.05
"""What is expected before anything has been seen."""

REQUESTS = 32
"""A step of so many requests counts as much in the average as all steps before it together, and one of fewer counts
less: how sure heads are differs from request to request."""

RETRYING_RATE = 1 / 4
"""The least that a step counts while heads are asked seldom."""


@dataclass
class _Gain:
    """What steps under one load are expected to emit and to take on average, and whether speculation has ended."""

    tokens: float = FIRST_GAIN
    plain_steps: float = 1.0
    idle: bool = False

    @property
    def gain(self) -> float:
        return self.tokens / self.plain_steps


class Gains:
    """How much faster than plain decoding speculation is expected to be, with the heads' own time, by load.

    A step of few requests may gain nothing because the heads happen to be unsure, so what counts is the average.
    """

    def __init__(self) -> None:
        self._by_load: defaultdict[int, _Gain] = defaultdict(_Gain)

    def of(self, num_reqs: int) -> float:
        """Return the average tokens per second under this load, by those of plain decoding."""
        return self._by_load[load_of(num_reqs)].gain

    def pays(self, num_reqs: int, tokens: float, plain_steps: float) -> bool:
        """Note what a step is expected to gain, and return whether speculation pays under this load.

        Args:
            num_reqs: requests of the step.
            tokens: that the step is expected to emit for each of them.
            plain_steps: what its verification and a proposal take together, in steps of plain decoding.

        """
        average = self._by_load[load_of(num_reqs)]
        rate = max(num_reqs / (num_reqs + REQUESTS), RETRYING_RATE if average.idle else 0)
        average.tokens += rate * (tokens - average.tokens)
        average.plain_steps += rate * (plain_steps - average.plain_steps)
        average.idle = average.gain <= 1 + MARGIN if average.idle else average.gain < 1
        return not average.idle


@dataclass
class _Pause:
    """How the heads are asked under one load."""

    in_vain: int = 0
    length: int = 0
    left: int = 0


class Pauses:
    """When the heads are not asked, in steps, by load: what a load has shown is still known when it comes again.

    All of it follows from what the scheduler has scheduled, which is the same on every rank; so all ranks ask the heads
    in the same steps, as tensor parallelism needs, whatever each has measured.
    """

    def __init__(self) -> None:
        self._by_load: defaultdict[int, _Pause] = defaultdict(_Pause)

    def saw(self, num_reqs: int, *, verified: bool) -> None:
        """Note whether anything of the last drafts was verified, in a step of so many requests."""
        pause = self._by_load[load_of(num_reqs)]
        if verified:
            pause.in_vain = pause.length = 0
            return
        pause.in_vain += 1
        if pause.in_vain >= PATIENCE:
            pause.length = pause.left = min(max(2 * pause.length, FIRST_PAUSE), LONGEST_PAUSE)

    def asks_heads(self, num_reqs: int) -> bool:
        """Whether to ask the heads in this step, of so many requests."""
        pause = self._by_load[load_of(num_reqs)]
        if pause.left:
            pause.left -= 1
            return False
        return True


def load_of(num_reqs: int) -> int:
    """Return which load a number of requests is: loads are told apart by powers of two."""
    return num_reqs.bit_length()
