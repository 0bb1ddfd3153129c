# SPDX-License-Identifier: Apache-2.0
"""Heads that are asked level by level, where what is drafted below a node depends on its path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_medusa.tree.topology import DraftTree


@dataclass(frozen=True, eq=False)
class Asked:
    """Nodes of one level whose children are to be predicted.

    Attributes:
        tokens: ``[num_reqs, nodes]``, int64: their tokens; at first the roots', ``[num_reqs, 1]``.
        parents: ``[num_reqs, nodes]``, int64: where each one's parent stands among the nodes that were asked for
            before; None for the roots.

    """

    tokens: torch.Tensor
    parents: torch.Tensor | None = None


class LevelHeads(Protocol):
    """Heads on one step's hidden states; each question, of either kind, goes to the next head."""

    def top_tokens(self, asked: Asked, top_k: int) -> torch.Tensor:
        """Return the nodes' most probable children, ``[num_reqs, nodes, top_k]``, int64, best first."""

    def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``top_tokens``, and before them their log-probabilities given the path, float32."""


class PlainHeads:
    """Heads that read the hidden state alone as ``LevelHeads``: they say the same of all nodes of a level.

    Args:
        log_probs: ``[num_reqs, heads, tokens]``, float32: of each head's most probable tokens, best first.
        tokens: ``[num_reqs, heads, tokens]``, int64: these.

    """

    def __init__(self, log_probs: torch.Tensor, tokens: torch.Tensor) -> None:
        self._log_probs, self._tokens = log_probs, tokens
        self._level = 0

    def top_tokens(self, asked: Asked, top_k: int) -> torch.Tensor:
        """Ask the next head (see ``LevelHeads``)."""
        return self.top_predictions(asked, top_k)[1]

    def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the next head (see ``LevelHeads``)."""
        shape = (*asked.tokens.shape, top_k)
        level = self._level
        self._level += 1
        return self._log_probs[:, level, None, :top_k].expand(shape), self._tokens[:, level, None, :top_k].expand(shape)


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes of one depth of a tree whose shape is fixed.

    Attributes:
        top_k: most children of a node of the depth above.
        places: ``[nodes]``, int64: each node's place among the children, ``[asked, top_k]``, of the nodes that were
            asked for.
        inner: ``[asked next]``, int64: those of ``places`` that have children themselves.

    """

    top_k: int
    places: torch.Tensor
    inner: torch.Tensor


@dataclass(frozen=True, eq=False)
class LevelPlan:
    """How a tree of fixed shape is filled with tokens.

    Attributes:
        levels: depth by depth.
        order: ``[nodes]``, int64: where each node, in the tree's order, is in the order of the levels.

    """

    levels: tuple[Level, ...]
    order: torch.Tensor

    @classmethod
    def of(cls, tree: DraftTree, ranks: Sequence[int]) -> LevelPlan:
        """Plan for a tree whose row i carries a token of rank ``ranks[i]`` among its parent's children."""
        parents, depths = tree.parents.tolist(), tree.depths.tolist()
        asked, levels, in_levels = [0], [], []
        for depth in range(1, tree.depth + 1):
            rows = [row for row in range(len(tree)) if depths[row] == depth]
            top_k = 1 + max(ranks[row] for row in rows)
            place = {row: asked.index(parents[row]) * top_k + ranks[row] for row in rows}
            asked = [row for row in rows if row in parents]
            inner = torch.tensor([place[row] for row in asked], dtype=torch.int64)
            levels.append(Level(top_k, torch.tensor(list(place.values())), inner))
            in_levels += rows
        return cls(tuple(levels), torch.tensor([in_levels.index(row) for row in range(1, len(tree))]))

    def to(self, device: torch.device) -> LevelPlan:
        """Return a plan that fills trees on another device."""
        levels = (Level(each.top_k, each.places.to(device), each.inner.to(device)) for each in self.levels)
        return LevelPlan(tuple(levels), self.order.to(device))

    def fill(
        self,
        heads: LevelHeads,
        roots: torch.Tensor,  # [num_reqs], int64
    ) -> torch.Tensor:
        """Return the token of each node, ``[num_reqs, nodes]``, int64; ``heads`` have not been asked yet."""
        asked, found = Asked(roots[:, None]), []
        for level in self.levels:
            tokens = heads.top_tokens(asked, level.top_k).flatten(1)
            found.append(tokens[:, level.places])
            asked = Asked(tokens[:, level.inner], (level.inner // level.top_k).expand(len(roots), -1))
        return torch.cat(found, dim=1)[:, self.order]
