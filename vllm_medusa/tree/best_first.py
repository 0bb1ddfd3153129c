# SPDX-License-Identifier: Apache-2.0
"""Trees grown best-first from how often paths of ranks are right on held-out text (paper, section 2.3.3).

A step accepts a node if all tokens of its path are right, so the expected number of accepted tokens is the sum over the
nodes of their paths' probabilities. A path is at most as probable as its parent's, so adding the best node again and
again gives the best tree of every size, and its prefixes are the best smaller trees.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from vllm_medusa.messages import shortened
from vllm_medusa.tree.static import RankPath, StaticTree, check_size, from_paths


class PathAccuracies(Protocol):
    """How often each path of ranks is right."""

    @property
    def available(self) -> int:
        """How many paths there are, nodes of the largest tree."""

    def children(self, path: RankPath, probability: float) -> Iterator[tuple[int, float]]:
        """Yield the ranks below a path of this probability, each with the probability of the longer path."""


@dataclass(frozen=True, eq=False)
class IndependentHeads:
    """Paths that are right with the product of their tokens' accuracies.

    Attributes:
        accuracies: ``[heads, ranks]``: the probability that head k + 1's token of rank r is the target's.

    Raises:
        ValueError: the accuracies are not probabilities.

    """

    accuracies: torch.Tensor

    def __post_init__(self) -> None:
        table = self.accuracies
        if table.ndim != 2 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(
                "medusa_tree: the calibrated accuracies must be a matrix [heads, ranks] of probabilities, "
                f"got {shortened(table.tolist())}; calibrate the heads again"
            )

    @property
    def available(self) -> int:
        """How many paths there are."""
        heads, ranks = self.accuracies.shape
        return available_nodes(heads, ranks)

    def children(self, path: RankPath, probability: float) -> Iterator[tuple[int, float]]:
        """Yield the ranks below a path (see ``PathAccuracies``)."""
        if len(path) < len(self._rows):
            for rank, accuracy in enumerate(self._rows[len(path)]):
                yield rank, probability * accuracy

    @cached_property
    def _rows(self) -> list[list[float]]:
        rows: list[list[float]] = self.accuracies.tolist()
        return rows


@dataclass(frozen=True, eq=False)
class JointPaths:
    """Paths that were counted whole, so that it shows how far heads are right together.

    Attributes:
        accuracies: each path's share of the positions; a path's parent is there too, and is no rarer.

    """

    accuracies: Mapping[RankPath, float]

    @property
    def available(self) -> int:
        """How many paths there are."""
        return len(self.accuracies)

    def children(self, path: RankPath, probability: float) -> Iterator[tuple[int, float]]:
        """Yield the ranks below a path (see ``PathAccuracies``)."""
        for child in self._children.get(path, ()):
            yield child[-1], self.accuracies[child]

    def within(self, depth: int, ranks: int | None) -> JointPaths:
        """Return the paths of at most so many ranks, each below ``ranks``; None is no limit."""
        kept = (path for path in self.accuracies if len(path) <= depth and (ranks is None or max(path) < ranks))
        return JointPaths({path: self.accuracies[path] for path in kept})

    @cached_property
    def _children(self) -> dict[RankPath, list[RankPath]]:
        children: dict[RankPath, list[RankPath]] = {}
        for path in self.accuracies:
            children.setdefault(path[:-1], []).append(path)
        return children


def best_first(accuracies: PathAccuracies, nodes: int) -> StaticTree:
    """Return the tree of ``nodes`` nodes that has the most tokens accepted per step.

    Args:
        accuracies: how often each path is right.
        nodes: drafted nodes, the root not counted.

    Raises:
        ValueError: there are fewer than ``nodes`` paths, or ``nodes`` is too many.

    """
    if not 1 <= nodes <= accuracies.available:
        raise ValueError(
            f"medusa_tree: the calibrated ranks give trees of 1 to {accuracies.available} nodes, not {nodes}; set "
            "num_speculative_tokens within that or calibrate more ranks"
        )
    check_size(nodes)
    paths: list[RankPath] = []
    frontier: list[tuple[float, int, RankPath]] = [(-1.0, 0, ())]
    while len(paths) <= nodes:
        negated, depth, path = heapq.heappop(frontier)
        paths.append(path)
        for rank, probability in accuracies.children(path, -negated):
            heapq.heappush(frontier, (-probability, depth + 1, (*path, rank)))
    return from_paths(paths[1:])


def available_nodes(heads: int, ranks: int) -> int:
    """Return how many nodes the largest tree has that ``ranks`` tokens of each head give."""
    return sum(ranks**depth for depth in range(1, heads + 1))


def path_probabilities(tree: StaticTree, accuracies: PathAccuracies) -> list[float]:
    """Return each drafted node's probability of being accepted, in row order; 0 for a path that is not known."""
    known: dict[RankPath, float] = {(): 1.0}
    for choice in tree.choices:
        *parent, rank = choice
        of_parent = known[tuple(parent)]
        known[tuple(choice)] = dict(accuracies.children(tuple(parent), of_parent)).get(rank, 0.0)
    return list(known.values())[1:]


def expected_acceptance_length(tree: StaticTree, accuracies: PathAccuracies) -> float:
    """Return the tokens that a step emits on average, ``1 + sum over nodes of their probability`` (section 2.3.3)."""
    return 1 + sum(path_probabilities(tree, accuracies))
