"""Which rows of which trees a step verifies: all that the host knows of it, whatever the trees look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True, eq=False)
class BranchingRows:
    """The rows of the trees that branch, side by side.

    Trees of fewer rows than the largest are padded at the end; padding rows repeat the tree's last row.

    Attributes:
        request: ``[trees]``, int64: index among the step's requests.
        length: ``[trees]``, int64: the tree's rows.
        row: ``[trees, rows]``, int64: each row's index among all rows of the step.
        kind: ``[trees]``, int64: which tree of the stack each one is.
        local: ``[trees, rows]``, int64: each row's place in its tree.

    """

    request: torch.Tensor
    length: torch.Tensor
    row: torch.Tensor
    kind: torch.Tensor
    local: torch.Tensor


@dataclass(frozen=True, eq=False)
class StepRows:
    """Which rows of which trees a step verifies, whatever the trees look like; on the device.

    Attributes:
        request: ``[rows]``, int64: the request that a row belongs to.
        local: ``[rows]``, int64: each row's place in its tree.
        row_kind: ``[rows]``, int64: which tree of the stack it belongs to.
        root: ``[requests]``, int64: each request's root, an index among all rows.
        drafting_requests: requests up to the last one with a draft.
        branching: the trees that branch; None if none does.

    """

    request: torch.Tensor
    local: torch.Tensor
    row_kind: torch.Tensor
    root: torch.Tensor
    drafting_requests: int
    branching: BranchingRows | None

    @classmethod
    def of(
        cls,
        kinds: Sequence[int],
        num_drafts: Sequence[int],
        chain_rows: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> StepRows:
        """Number a step's rows, on the host, and send them to the device without waiting for it.

        Args:
            kinds: for each request, which tree of a stack its draft follows.
            num_drafts: for each request, how many of its tree's rows, the root not counted, the step verifies.
            chain_rows: for each tree of the stack, how many of its first rows are known to be a chain.
            device: where the rows go.

        """
        send = partial(put, device=torch.device(device))
        kind, lengths = torch.tensor(kinds), torch.tensor(num_drafts) + 1
        start = lengths.cumsum(0) - lengths
        request = torch.repeat_interleave(torch.arange(len(kind)), lengths)
        branching = (lengths > torch.tensor(chain_rows)[kind]).nonzero().flatten()
        return cls(
            request=send(request),
            local=send(torch.arange(len(request)) - start[request]),
            row_kind=send(kind[request]),
            root=send(start),
            drafting_requests=max((index + 1 for index, drafts in enumerate(num_drafts) if drafts), default=0),
            branching=cls._branching(branching, kind, lengths, start, send) if len(branching) else None,
        )

    @staticmethod
    def _branching(
        request: torch.Tensor,  # [trees], int64
        kind: torch.Tensor,  # [requests], int64
        lengths: torch.Tensor,  # [requests], int64
        start: torch.Tensor,  # [requests], int64
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> BranchingRows:
        lengths = lengths[request]
        local = torch.arange(int(lengths.max())).expand(len(request), -1).minimum(lengths[:, None] - 1)
        return BranchingRows(
            request=send(request),
            length=send(lengths),
            row=send(start[request][:, None] + local),
            kind=send(kind[request]),
            local=send(local),
        )


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a tensor to the device without waiting for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
