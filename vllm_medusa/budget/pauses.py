# SPDX-License-Identifier: Apache-2.0
"""Whether the heads are asked at all: they are not where what they say is not worth verifying."""

from __future__ import annotations

PATIENCE = 3
"""Drafts in a row of which nothing is verified before the heads pause."""

FIRST_PAUSE, LONGEST_PAUSE = 4, 64
"""Steps; each pause is twice as long as the last one. After the longest ones, asking costs a 64th of its price."""

MARGIN = 0.03
"""By how much speculation has to be faster than plain decoding to begin again, so that it does not come and go."""

FIRST_GAIN = 1.05
"""What is expected before anything has been seen."""

REQUESTS = 32
"""Requests, of one step or of several, after which what was seen before counts half or less: how sure heads are differs
from request to request, so a step of many says more."""

RETRYING_RATE = 1 / 4
"""The least that a step counts while heads are asked seldom."""


class Gains:
    """How much faster than plain decoding speculation is expected to be, with the heads' own time, by load.

    A step of few requests may gain nothing because the heads happen to be unsure, so what counts is the average. Loads
    are told apart by powers of two of the number of requests.
    """

    def __init__(self) -> None:
        self._average: dict[int, float] = {}
        self._idle: set[int] = set()

    def pays(self, num_reqs: int, gain: float) -> bool:
        """Note a step's expected gain, and return whether speculation pays under this load.

        Args:
            num_reqs: requests of the step.
            gain: expected tokens per second with the proposal and its verification, by those of plain decoding.

        """
        load = num_reqs.bit_length()
        rate = max(num_reqs / (num_reqs + REQUESTS), RETRYING_RATE if load in self._idle else 0)
        average = self._average.get(load, FIRST_GAIN)
        average += rate * (gain - average)
        self._average[load] = average
        if average < 1:
            self._idle.add(load)
        elif average > 1 + MARGIN:
            self._idle.discard(load)
        return load not in self._idle


class Pauses:
    """When the heads are not asked, in steps.

    All of it follows from what the scheduler has scheduled, which is the same on every rank; so all ranks ask the heads
    in the same steps, as tensor parallelism needs, whatever each has measured.
    """

    def __init__(self) -> None:
        self._in_vain = 0
        self._pause = 0
        self._left = 0
        self._paused_at = 0

    def saw(self, num_reqs: int, *, verified: bool) -> None:
        """Note whether anything of the last drafts was verified, in a step of so many requests."""
        if verified:
            self._in_vain = self._pause = 0
            return
        self._in_vain += 1
        if self._in_vain >= PATIENCE:
            self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
            self._left, self._paused_at = self._pause, num_reqs

    def asks_heads(self, num_reqs: int) -> bool:
        """Whether to ask the heads in this step, of so many requests; a pause ends where the load has halved."""
        if self._left and 2 * num_reqs > self._paused_at:
            self._left -= 1
            return False
        self._left = 0
        return True
