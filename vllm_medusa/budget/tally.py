# SPDX-License-Identifier: Apache-2.0
"""What a budget has done and what came of it, for people to see."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np

BINS = 10
"""Nodes are told apart by tenths of the probability that was expected of them."""


def _ints() -> np.ndarray:
    return np.zeros(BINS, dtype=np.int64)


@dataclass(eq=False)
class Tally:
    """Totals since the last ``take``.

    Attributes:
        steps: steps in which a request could have a draft.
        asked: those in which the heads were asked.
        requests: requests of all steps.
        drafted: nodes that the heads drafted for them.
        chosen: nodes that the budget let through.
        nodes: ``[BINS]``, int64: verified nodes, by the probability that the budget expected of them; 0 where only the
            device knows it.
        expected: ``[BINS]``, float64: the sum of these probabilities.
        accepted: ``[BINS]``, int64: how many of the nodes were accepted.

    """

    steps: int = 0
    asked: int = 0
    requests: int = 0
    drafted: int = 0
    chosen: int = 0
    nodes: np.ndarray = field(default_factory=_ints)
    expected: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    accepted: np.ndarray = field(default_factory=_ints)

    def began(self, num_reqs: int) -> None:
        """Note a step in which so many requests can have a draft."""
        self.steps += 1
        self.requests += num_reqs

    def asked_for(self, drafted: int) -> None:
        """Note that a step's heads were asked, and how many nodes they drafted."""
        self.asked += 1
        self.drafted += drafted

    def chose(self, num_nodes: int) -> None:
        """Note how many drafted nodes a step was let verify."""
        self.chosen += num_nodes

    def verified(
        self,
        probabilities: np.ndarray,  # [nodes], float32
        accepted: np.ndarray,  # [nodes], bool
    ) -> None:
        """Note which of a step's verified nodes were accepted, and how probable each was taken to be."""
        place = (probabilities * BINS).astype(np.int64).clip(0, BINS - 1)
        self.nodes += np.bincount(place, minlength=BINS)
        self.expected += np.bincount(place, probabilities, minlength=BINS)
        self.accepted += np.bincount(place[accepted], minlength=BINS)

    def take(self) -> Self:
        """Return the totals, and begin anew."""
        taken, new = type(self)(**vars(self)), type(self)()
        for each in fields(self):
            setattr(self, each.name, getattr(new, each.name))
        return taken
