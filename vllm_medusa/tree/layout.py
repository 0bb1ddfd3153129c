"""The trees of one step's requests, row after row: all that follows from the shapes of their drafts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_medusa.tree.rows import BranchingRows, StepRows
from vllm_medusa.tree.topology import ROOT, DraftTree, packed

KEPT_LAYOUTS = 256
"""Layouts that a table remembers: requests that decode undisturbed have the same one step after step."""


@dataclass(frozen=True, eq=False)
class Branching:
    """The trees of a layout that branch, side by side.

    Attributes:
        rows: which rows of which trees these are, padding included.
        depth: ``[trees, rows]``, int64.
        ancestors: ``[trees, rows, rows]``, bool: row i may attend to row j.

    """

    rows: BranchingRows
    depth: torch.Tensor
    ancestors: torch.Tensor


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """The rows of one step's trees, request by request, on the device.

    Attributes:
        request: ``[rows]``, int64: the request that a row belongs to.
        parent: ``[rows]``, int64: the parent's index among all rows; -1 for roots.
        depth: ``[rows]``, int64.
        shift: ``[rows]``, int64: the row's depth less its place in the tree, which is its depth in a chain.
        root: ``[requests]``, int64: each request's root, an index among all rows.
        max_depth: at least the deepest tree's depth, known on the host.
        drafting_requests: requests up to the last one with a draft, known on the host.
        rows: which rows of which trees these are.
        stack: the trees.

    """

    request: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor
    shift: torch.Tensor
    root: torch.Tensor
    max_depth: int
    drafting_requests: int
    rows: StepRows
    stack: TreeStack

    @cached_property
    def words(self) -> torch.Tensor:
        """``[rows, words]``, int64: each row's ancestors in its tree (see ``topology.packed``)."""
        return self.stack.words[self.rows.row_kind, self.rows.local]

    @cached_property
    def branching(self) -> Branching | None:
        """The trees that branch; None if none does."""
        return self.stack.branching(self.rows.branching) if self.rows.branching is not None else None


@dataclass(frozen=True, eq=False)
class TreeStack:
    """Trees side by side; those of fewer rows than the largest are padded at the end. All tensors live on one device.

    Attributes:
        parents: ``[trees, rows]``, int64: the row of each row's parent in its tree; -1 for roots and padding.
        depths: ``[trees, rows]``, int64.
        ancestors: ``[trees, rows, rows]``, bool: row i may attend to row j.

    """

    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor

    @classmethod
    def of(cls, trees: Sequence[DraftTree]) -> TreeStack:
        """Stack trees, on the CPU."""
        rows = max(map(len, trees))
        ancestors = torch.zeros(len(trees), rows, rows, dtype=torch.bool)
        for index, tree in enumerate(trees):
            ancestors[index, : len(tree), : len(tree)] = tree.ancestors
        return cls(
            pad_sequence([tree.parents for tree in trees], batch_first=True, padding_value=ROOT),
            pad_sequence([tree.depths for tree in trees], batch_first=True),
            ancestors,
        )

    @cached_property
    def words(self) -> torch.Tensor:
        """``[trees, rows, words]``, int64: ``ancestors``, ``packed``."""
        return packed(self.ancestors)

    @cached_property
    def chain_rows(self) -> torch.Tensor:
        """``[trees]``, int64: the largest prefix of each tree that is a chain."""
        rows = torch.arange(-1, self.parents.shape[1] - 1, device=self.parents.device)
        return (self.parents == rows).long().cumprod(dim=1).sum(dim=1)

    def to(self, device: torch.device) -> TreeStack:
        """Return the stack on another device."""
        return TreeStack(self.parents.to(device), self.depths.to(device), self.ancestors.to(device))

    def layout(self, rows: StepRows, max_depth: int) -> TreeLayout:
        """Lay out a step's trees, none of which is deeper than ``max_depth``."""
        parent, depth = (each[rows.row_kind, rows.local] for each in (self.parents, self.depths))
        return TreeLayout(
            request=rows.request,
            parent=torch.where(parent >= 0, parent + rows.root[rows.request], ROOT),
            depth=depth,
            shift=depth - rows.local,
            root=rows.root,
            max_depth=max_depth,
            drafting_requests=rows.drafting_requests,
            rows=rows,
            stack=self,
        )

    def branching(self, rows: BranchingRows) -> Branching:
        """Put trees that branch side by side."""
        is_row = torch.arange(rows.local.shape[1], device=rows.local.device) < rows.length[:, None]
        ancestors = self.ancestors[rows.kind[:, None], rows.local][:, :, : rows.local.shape[1]]
        return Branching(
            rows=rows,
            depth=self.depths[rows.kind[:, None], rows.local],
            ancestors=ancestors & is_row[:, None],
        )


class TreeTable:
    """The trees that drafts may have, and the layouts of steps whose requests follow them.

    Args:
        trees: the trees; any prefix of one may be drafted.
        device: where layouts go.

    """

    def __init__(self, trees: Sequence[DraftTree], device: torch.device | str = "cpu") -> None:
        stack = TreeStack.of(trees)
        self._device = torch.device(device)
        self._chain_rows = stack.chain_rows.tolist()
        self._depth_of_prefix = stack.depths.cummax(dim=1).values.tolist()
        self._stack = stack.to(self._device)
        self._kept = lru_cache(KEPT_LAYOUTS)(self._layout)

    def layout(self, kinds: Sequence[int], num_drafts: Sequence[int]) -> TreeLayout:
        """Lay out a step's trees; a layout that was asked for lately costs nothing.

        Args:
            kinds: for each request, which tree of the table its draft follows.
            num_drafts: for each request, how many of its tree's rows, the root not counted, the step verifies.

        """
        return self._kept(tuple(kinds), tuple(num_drafts))

    def _layout(self, kinds: tuple[int, ...], num_drafts: tuple[int, ...]) -> TreeLayout:
        rows = StepRows.of(kinds, num_drafts, self._chain_rows, self._device)
        depths = (self._depth_of_prefix[kind][drafts] for kind, drafts in zip(kinds, num_drafts, strict=True))
        return self._stack.layout(rows, max(depths))
