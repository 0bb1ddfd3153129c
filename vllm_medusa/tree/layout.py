"""The trees of one step's requests, row after row: all that follows from the shapes of their drafts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_medusa.tree.topology import WORD_BITS, DraftTree

KEPT_LAYOUTS = 256
"""Layouts that a table remembers: requests that decode undisturbed have the same one step after step."""


@dataclass(frozen=True, eq=False)
class Branching:
    """The trees of a layout that branch, side by side.

    Trees of fewer rows than the largest are padded at the end; padding rows repeat the tree's last row.

    Attributes:
        request: ``[trees]``, int64: index among the step's requests.
        length: ``[trees]``, int64: the tree's rows.
        row: ``[trees, rows]``, int64: each row's index among all rows of the layout.
        depth: ``[trees, rows]``, int64.
        ancestors: ``[trees, rows, rows]``, bool: row i may attend to row j.

    """

    request: torch.Tensor
    length: torch.Tensor
    row: torch.Tensor
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
        words: ``[rows, words]``, int64: the row's ancestors in its tree (see ``DraftTree.bitmasks``).
        root: ``[requests]``, int64: each request's root, an index among all rows.
        kind: ``[requests]``, int64: which tree of the table each request's draft follows.
        max_depth: the deepest tree's depth, known on the host.
        drafting_requests: requests up to the last one with a draft, known on the host.
        branching: the trees that branch; None if none does.

    """

    request: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor
    shift: torch.Tensor
    words: torch.Tensor
    root: torch.Tensor
    kind: torch.Tensor
    max_depth: int
    drafting_requests: int
    branching: Branching | None


class TreeTable:
    """The trees that drafts may have, and the layouts of steps whose requests follow them.

    Args:
        trees: the trees; any prefix of one may be drafted.
        device: where layouts go.

    Attributes:
        chain_rows: ``[trees]``, int64: the largest prefix of each tree that is a chain.

    """

    def __init__(self, trees: Sequence[DraftTree], device: torch.device | str = "cpu") -> None:
        rows = max(len(tree) for tree in trees)
        words = -(-rows // WORD_BITS)
        self._device = torch.device(device)
        self._parents = pad_sequence([tree.parents for tree in trees], batch_first=True, padding_value=-1)
        self._depths = pad_sequence([tree.depths for tree in trees], batch_first=True)
        self._ancestors = torch.zeros(len(trees), rows, rows, dtype=torch.bool)
        self._words = torch.zeros(len(trees), rows, words, dtype=torch.int64)
        for index, tree in enumerate(trees):
            self._ancestors[index, : len(tree), : len(tree)] = tree.ancestors
            self._words[index, : len(tree), : tree.bitmasks.shape[1]] = tree.bitmasks
        in_chain = self._parents == torch.arange(-1, rows - 1)
        self.chain_rows = in_chain.long().cumprod(dim=1).sum(dim=1)
        self._kept = lru_cache(KEPT_LAYOUTS)(self._layout)

    def layout(self, kind: Sequence[int], num_drafts: Sequence[int]) -> TreeLayout:
        """Lay out a step's trees; a layout that was asked for lately costs nothing.

        Args:
            kind: for each request, which tree of the table its draft follows.
            num_drafts: for each request, how many of its tree's rows, the root not counted, the step verifies.

        """
        return self._kept(tuple(kind), tuple(num_drafts))

    def _layout(self, kinds: tuple[int, ...], num_drafts: tuple[int, ...]) -> TreeLayout:
        kind, lengths = torch.tensor(kinds), torch.tensor(num_drafts) + 1
        start = lengths.cumsum(0) - lengths
        request = torch.repeat_interleave(torch.arange(len(kind)), lengths)
        local = torch.arange(len(request)) - start[request]
        parent = self._parents[kind[request], local]
        depth = self._depths[kind[request], local]
        return TreeLayout(
            request=self._put(request),
            parent=self._put(torch.where(parent >= 0, parent + start[request], -1)),
            depth=self._put(depth),
            shift=self._put(depth - local),
            words=self._put(self._words[kind[request], local]),
            root=self._put(start),
            kind=self._put(kind),
            max_depth=int(depth.max()),
            drafting_requests=max((index + 1 for index, drafts in enumerate(num_drafts) if drafts), default=0),
            branching=self._branching(kind, lengths, start),
        )

    def _branching(self, kind: torch.Tensor, lengths: torch.Tensor, start: torch.Tensor) -> Branching | None:
        branching = (lengths > self.chain_rows[kind]).nonzero().flatten()
        if not len(branching):
            return None
        lengths, kind, start = lengths[branching], kind[branching], start[branching]
        rows = int(lengths.max())
        last = lengths[:, None] - 1
        local = torch.arange(rows).expand(len(branching), -1).minimum(last)
        ancestors = self._ancestors[kind[:, None], local][:, :, :rows]
        return Branching(
            request=self._put(branching),
            length=self._put(lengths),
            row=self._put(start[:, None] + local),
            depth=self._put(self._depths[kind[:, None], local]),
            ancestors=self._put(ancestors & (torch.arange(rows) <= last)[:, None]),
        )

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send a tensor to the device without waiting for it."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
