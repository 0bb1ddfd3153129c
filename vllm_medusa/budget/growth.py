# SPDX-License-Identifier: Apache-2.0
"""How far trees are grown: a level takes time, and is not worth it where none of its nodes would be verified."""

from __future__ import annotations

from collections import defaultdict

from vllm_medusa.budget.pauses import load_of

RATE = 1 / 16
"""The weight of a step in the average."""

BEST_CHILD, FOLLOWED = 0.5, 0.9
"""How probable a best child is taken to be, given its parent: heads are seldom surer, and a level has its price. What
followed a long match earlier in the text is surer."""


class Growth:
    """The most probable node that a step leaves unverified, on average, by load.

    Children are worth asking for where the best one is expected to be more probable than that.

    Args:
        best_child: how probable that is, given its parent.

    """

    def __init__(self, best_child: float) -> None:
        self._best_child = best_child
        self._average: defaultdict[int, float] = defaultdict(float)

    def left(self, num_reqs: int, probability: float) -> None:
        """Note the probability of the most probable node that a step of so many requests left; 0 if it left none."""
        load = load_of(num_reqs)
        self._average[load] += RATE * (probability - self._average[load])

    def least_parent(self, num_reqs: int) -> float:
        """Return the least probability of a node whose children may be worth verifying under this load."""
        return min(self._average[load_of(num_reqs)] / self._best_child, 1.0)
