"""Trees of many requests, side by side in flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """The draft trees of one step's requests, their rows one after another, request by request.

    A request without a draft is a tree of one row. All tensors live on one device.

    Attributes:
        request: ``[rows]``, int64: the request that a row belongs to.
        parent: ``[rows]``, int64: the parent's index among all rows; -1 for roots.
        token: ``[rows]``, int64: the drafted token; a root's is never read.
        root: ``[requests]``, int64: each request's root, an index among all rows.
        max_depth: the deepest tree's depth, known on the host.

    """

    request: torch.Tensor
    parent: torch.Tensor
    token: torch.Tensor
    root: torch.Tensor
    max_depth: int

    def child(self, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Find the child of each request's row that carries the token.

        Args:
            row: ``[requests]``, int64: the row where each request stands.
            token: ``[requests]``, int64: the token drawn there.

        Returns:
            ``[requests]``, int64: the child's row, -1 where no child carries the token.

        """
        match = (self.parent == row[self.request]) & (self.token == token[self.request])
        rows = torch.arange(len(self.parent), device=match.device)
        none = torch.full_like(self.root, -1)
        return none.scatter_reduce(0, self.request, torch.where(match, rows, -1), "amax")
