# SPDX-License-Identifier: Apache-2.0
"""Trees that are the same for every request: chain, Cartesian product, explicit choices (best-first: ``best_first``).

A node's path is the ranks from the root down to it, as in the reference implementation's ``medusa_choices``:
``[2, 0]`` is head 2's most probable token below head 1's third most probable one. The scheduler may cut a
draft to its first rows, so every builder but the explicit one puts the rows that are likely accepted first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from operator import mul
from typing import NamedTuple

import torch

from vllm_medusa.messages import shortened
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.levels import LevelHeads, LevelPlan
from vllm_medusa.tree.topology import ROOT, DraftTree

RankPath = tuple[int, ...]
"""A node's path: the ranks from the root down to it."""

MAX_NODES = 1024
"""Most nodes of a tree: its masks grow with their square, and no target verifies more in a step at a profit."""


class _Nodes(NamedTuple):
    """What drafting reads of a static tree, on the heads' device; ``[num_nodes]``, int64, but length and log_probs."""

    heads: torch.Tensor
    ranks: torch.Tensor
    parents: torch.Tensor
    length: torch.Tensor
    log_probs: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class StaticTree:
    """A tree whose rows are bound to ranks of the heads' predictions rather than to tokens.

    Attributes:
        topology: the tree.
        ranks: ``[rows]``, int64, on the CPU: row i carries its head's ``ranks[i]``-th most probable token
            (0 = top-1); the root's is 0 and never read.
        log_probs: ``[num_nodes]``, float32, on the CPU: how probable each node's path is on average, for
            ``Drafts.log_probs``; None where that is not asked for.

    """

    topology: DraftTree
    ranks: torch.Tensor
    log_probs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.ranks.shape != self.topology.parents.shape or self.ranks.dtype != torch.int64:
            raise ValueError(
                f"ranks must be an int64 vector of {len(self.topology)} rows, "
                f"got {self.ranks.dtype} {tuple(self.ranks.shape)}"
            )

    def __len__(self) -> int:
        return len(self.topology)

    @property
    def num_nodes(self) -> int:
        """The number of nodes, the root not counted."""
        return len(self) - 1

    def prefix(self, num_rows: int) -> StaticTree:
        """Return the tree of the first ``num_rows`` rows, the root counted."""
        if num_rows >= len(self):
            return self
        log_probs = None if self.log_probs is None else self.log_probs[: num_rows - 1]
        return StaticTree(self.topology.prefix(num_rows), self.ranks[:num_rows], log_probs)

    @property
    def branches(self) -> bool:
        """Whether it is another tree than a chain."""
        return not self.topology.is_chain

    def to(self, device: torch.device) -> StaticTree:
        """Return a tree that drafts on another device."""
        moved = copy.copy(self)
        nodes = {name: each.to(device) for name, each in self._nodes._asdict().items() if each is not None}
        moved.__dict__["_nodes"] = _Nodes(**nodes)
        moved.__dict__["_plan"] = self._plan.to(device)
        return moved

    def draft(
        self,
        tokens: torch.Tensor,  # [num_reqs, heads, top_k], int64
    ) -> Drafts:
        """Draft for each request.

        Args:
            tokens: each head's most probable tokens, best first.

        """
        return self._drafts(tokens[:, self._nodes.heads, self._nodes.ranks])

    def draft_by_level(
        self,
        heads: LevelHeads,
        roots: torch.Tensor,  # [num_reqs], int64
    ) -> Drafts:
        """Draft as ``draft`` does, level by level; ``roots`` are the last sampled tokens."""
        return self._drafts(self._plan.fill(heads, roots))

    def _drafts(
        self,
        drafted: torch.Tensor,  # [num_reqs, num_nodes], int64
    ) -> Drafts:
        nodes = self._nodes
        log_probs = None if nodes.log_probs is None else nodes.log_probs.expand(drafted.shape)
        return Drafts(drafted, nodes.parents.expand_as(drafted), nodes.length.expand(len(drafted)), log_probs)

    @cached_property
    def _plan(self) -> LevelPlan:
        return LevelPlan.of(self.topology, self.ranks.tolist())

    @cached_property
    def _nodes(self) -> _Nodes:
        return _Nodes(
            heads=self.topology.depths[1:] - 1,
            ranks=self.ranks[1:],
            parents=self.topology.parents[1:],
            length=torch.tensor(self.num_nodes),
            log_probs=self.log_probs,
        )

    @property
    def depth(self) -> int:
        """The longest path's number of ranks: how many heads the tree needs."""
        return self.topology.depth

    @cached_property
    def top_k(self) -> int:
        """How many of each head's most probable tokens the tree needs."""
        return int(self.ranks.max()) + 1

    @property
    def choices(self) -> list[list[int]]:
        """Each drafted row's path, in row order, the root left out."""
        paths: list[list[int]] = [[]]
        for parent, rank in zip(self.topology.parents.tolist()[1:], self.ranks.tolist()[1:], strict=True):
            paths.append([*paths[parent], rank])
        return paths[1:]


def chain(depth: int) -> StaticTree:
    """Return the chain of each head's most probable token, ``depth`` tokens long."""
    if depth < 1:
        raise ValueError(f"medusa_tree: a chain of depth {depth} drafts nothing; give a depth of at least 1")
    return from_paths((0,) * length for length in range(1, depth + 1))


def cartesian(widths: Sequence[int]) -> StaticTree:
    """Return the tree in which every node at depth d has ``widths[d]`` children, of ranks 0, 1, ...

    Args:
        widths: children of the root, of each node at depth 1, and so on.

    Raises:
        ValueError: ``widths`` is empty, holds something that is not a positive integer, or gives too large a tree.

    """
    if not widths or not all(_is_rank(width) and width > 0 for width in widths):
        raise ValueError(
            f"medusa_tree: {shortened(list(widths))} is not a Cartesian product; "
            "give one integer of at least 1 per depth, such as [4, 2, 2]"
        )
    check_size(sum(accumulate(widths, mul)))
    paths = (path for depth in range(len(widths)) for path in product(*map(range, widths[: depth + 1])))
    return from_paths(sorted(paths, key=lambda path: (sum(path) + len(path), len(path), path)))


def from_choices(choices: Sequence[Sequence[int]]) -> StaticTree:
    """Return the tree of explicit paths such as ``[[0], [0, 0], [1]]``.

    Rows keep the order of the paths if each comes after its parent, else they are sorted by depth.

    Args:
        choices: every drafted node's path; a path's parent must be listed too.

    Raises:
        ValueError: there is no path, too many, or one that is not a list of ranks, is listed twice, or has no parent.

    """
    if not choices:
        raise ValueError("medusa_tree: the list of paths is empty; give at least one path, such as [[0]]")
    check_size(len(choices))
    paths: dict[RankPath, None] = {}
    for choice in choices:
        if not isinstance(choice, list | tuple) or not choice or not all(map(_is_rank, choice)):
            raise ValueError(
                f"medusa_tree: {shortened(choice)} is not a path; a path is a list of one or more ranks from 0 "
                "(a head's most probable token) up, such as [0, 2], and the root is implied"
            )
        if tuple(choice) in paths:
            raise ValueError(f"medusa_tree: path {shortened(list(choice))} is listed twice; list each path once")
        paths[tuple(choice)] = None
    for path in paths:
        if path[:-1] and path[:-1] not in paths:
            raise ValueError(
                f"medusa_tree: path {shortened(list(path))} has no parent; "
                f"every path but those of one rank hangs below another, add {shortened(list(path[:-1]))}"
            )
    row = {path: index for index, path in enumerate(paths)}
    parent_first = all(row.get(path[:-1], ROOT) < row[path] for path in paths)
    return from_paths(paths if parent_first else sorted(paths, key=len))


def validate_depth(tree: StaticTree, num_heads: int) -> None:
    """Raise ``ValueError``, naming the first path that is too long, if the tree is deeper than the heads."""
    for path in tree.choices:
        if len(path) > num_heads:
            raise ValueError(
                f"medusa_tree: path {shortened(path)} is {len(path)} deep, but there are {num_heads} heads; "
                f"give paths of at most {num_heads} ranks"
            )


def check_size(nodes: int) -> None:
    """Raise ``ValueError`` for more than ``MAX_NODES`` nodes."""
    if nodes > MAX_NODES:
        raise ValueError(f"medusa_tree: {nodes} nodes are asked for; give a tree of at most {MAX_NODES}")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def from_paths(paths: Iterable[RankPath]) -> StaticTree:
    """Return the tree of paths that are known to be in parent-first order; the root comes before them all."""
    row: dict[RankPath, int] = {(): 0}
    parents, ranks = [ROOT], [0]
    for path in paths:
        parents.append(row[path[:-1]])
        ranks.append(path[-1])
        row[path] = len(row)
    return StaticTree(DraftTree.from_parents(parents), torch.tensor(ranks, dtype=torch.int64))
