# SPDX-License-Identifier: Apache-2.0
"""The draft tree: one integer array of parents, from which everything else is derived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

ROOT = -1
"""The parent of row 0."""


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A draft tree in parent-first order; row 0 is the root, the token that the target has sampled already.

    Attributes:
        parents: ``[num_rows]``, int64, on the CPU: the row of each row's parent; ``parents[0] == -1``.

    Raises:
        ValueError: ``parents`` is empty, does not start with -1, or names a parent that does not come before its child.

    """

    parents: torch.Tensor

    def __post_init__(self) -> None:
        parents = self.parents
        if parents.ndim != 1 or parents.numel() == 0 or parents.dtype != torch.int64:
            raise ValueError(f"parents must be a non-empty int64 vector, got {parents.dtype} {tuple(parents.shape)}")
        if int(parents[0]) != ROOT:
            raise ValueError(f"parents[0] must be {ROOT} (the root), got {int(parents[0])}")
        misplaced = (parents[1:] < 0) | (parents[1:] >= torch.arange(1, len(parents)))
        if misplaced.any():
            row = int(misplaced.nonzero()[0]) + 1
            raise ValueError(f"parents[{row}] must be one of rows 0..{row - 1}, got {int(parents[row])}")

    @classmethod
    def from_parents(cls, parents: Sequence[int]) -> DraftTree:
        """Build a tree from a plain sequence of parents, the root's -1 included."""
        return cls(torch.tensor(list(parents), dtype=torch.int64))

    @classmethod
    def chain(cls, depth: int) -> DraftTree:
        """Return the tree of ``depth + 1`` rows in which every row but the last has one child."""
        return cls(torch.arange(-1, depth))

    def __len__(self) -> int:
        return len(self.parents)

    def prefix(self, num_rows: int) -> DraftTree:
        """Return the tree of the first ``num_rows`` rows; every prefix of a tree is a tree."""
        return self if num_rows >= len(self) else DraftTree(self.parents[:num_rows])

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """``[num_rows, num_rows]``, bool: row i may attend to row j (j is i itself or above it)."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for row, parent in enumerate(self.parents.tolist()[1:], start=1):
            mask[row] |= mask[parent]
        return mask

    @cached_property
    def depths(self) -> torch.Tensor:
        """``[num_rows]``, int64: edges between a row and the root."""
        return self.ancestors.sum(dim=1) - 1

    @property
    def depth(self) -> int:
        """The longest path's number of edges."""
        return int(self.depths.max())

    @cached_property
    def is_chain(self) -> bool:
        """Whether every row's parent is the row before it, so that causal attention is right for it."""
        return bool((self.parents == torch.arange(-1, len(self) - 1)).all())
