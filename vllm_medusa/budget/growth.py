# SPDX-License-Identifier: Apache-2.0
"""How far trees are grown: a level takes time, and is not worth it where none of its nodes would be verified."""

from __future__ import annotations

from collections import defaultdict

from vllm_medusa.budget.pauses import load_of

RATE = 1 / 16
"""The weight of a step in the average."""


class Growth:
    """The most probable node that a step leaves unverified, on average, by load.

    A node's children are at most as probable as the node. So those of a less probable one are not worth asking for.
    """

    def __init__(self) -> None:
        self._average: defaultdict[int, float] = defaultdict(float)

    def left(self, num_reqs: int, probability: float) -> None:
        """Note the probability of the most probable node that a step of so many requests left; 0 if it left none."""
        load = load_of(num_reqs)
        self._average[load] += RATE * (probability - self._average[load])

    def least_parent(self, num_reqs: int) -> float:
        """Return the least probability of a node whose children may be worth verifying under this load."""
        return self._average[load_of(num_reqs)]
