"""The trees of one step's requests, row after row: all that follows from the shapes of their drafts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_medusa.tree.topology import ROOT, DraftTree, packed

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
        words: ``[rows, words]``, int64: the row's ancestors in its tree (see ``topology.packed``).
        root: ``[requests]``, int64: each request's root, an index among all rows.
        kind: ``[requests]``, int64: which tree of the stack each request's draft follows.
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


@dataclass(frozen=True, eq=False)
class TreeStack:
    """Trees side by side; those of fewer rows than the largest are padded at the end.

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
        """Stack trees."""
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
        in_chain = self.parents == torch.arange(-1, self.parents.shape[1] - 1)
        return in_chain.long().cumprod(dim=1).sum(dim=1)

    def layout(self, kinds: Sequence[int], num_drafts: Sequence[int], device: torch.device | str = "cpu") -> TreeLayout:
        """Lay out a step's trees.

        Args:
            kinds: for each request, which tree its draft follows.
            num_drafts: for each request, how many of its tree's rows, the root not counted, the step verifies.
            device: where the layout goes.

        """
        put = partial(_put, device=torch.device(device))
        kind, lengths = torch.tensor(kinds), torch.tensor(num_drafts) + 1
        start = lengths.cumsum(0) - lengths
        request = torch.repeat_interleave(torch.arange(len(kind)), lengths)
        local = torch.arange(len(request)) - start[request]
        parent = self.parents[kind[request], local]
        depth = self.depths[kind[request], local]
        return TreeLayout(
            request=put(request),
            parent=put(torch.where(parent >= 0, parent + start[request], ROOT)),
            depth=put(depth),
            shift=put(depth - local),
            words=put(self.words[kind[request], local]),
            root=put(start),
            kind=put(kind),
            max_depth=int(depth.max()),
            drafting_requests=max((index + 1 for index, drafts in enumerate(num_drafts) if drafts), default=0),
            branching=self._branching(kind, lengths, start, put),
        )

    def _branching(
        self,
        kind: torch.Tensor,
        lengths: torch.Tensor,
        start: torch.Tensor,
        put: Callable[[torch.Tensor], torch.Tensor],
    ) -> Branching | None:
        branching = (lengths > self.chain_rows[kind]).nonzero().flatten()
        if not len(branching):
            return None
        lengths, kind, start = lengths[branching], kind[branching], start[branching]
        rows = int(lengths.max())
        last = lengths[:, None] - 1
        local = torch.arange(rows).expand(len(branching), -1).minimum(last)
        ancestors = self.ancestors[kind[:, None], local][:, :, :rows]
        return Branching(
            request=put(branching),
            length=put(lengths),
            row=put(start[:, None] + local),
            depth=put(self.depths[kind[:, None], local]),
            ancestors=put(ancestors & (torch.arange(rows) <= last)[:, None]),
        )


class TreeTable:
    """The trees that drafts may have, and the layouts of steps whose requests follow them.

    Args:
        trees: the trees; any prefix of one may be drafted.
        device: where layouts go.

    """

    def __init__(self, trees: Sequence[DraftTree], device: torch.device | str = "cpu") -> None:
        stack = TreeStack.of(trees)
        self._kept = lru_cache(KEPT_LAYOUTS)(partial(stack.layout, device=device))

    def layout(self, kinds: Sequence[int], num_drafts: Sequence[int]) -> TreeLayout:
        """Lay out a step's trees (see ``TreeStack.layout``); one that was asked for lately costs nothing."""
        return self._kept(tuple(kinds), tuple(num_drafts))


def _put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a tensor to the device without waiting for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
