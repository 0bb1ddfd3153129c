"""What a step's branching trees look like to attention, and how a metadata builder learns of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)
class TreeQueries:
    """The requests of a step whose drafts branch; all others are causal and stay with the native attention.

    Trees of fewer rows than the largest are padded at the end; padding rows repeat the tree's last token, so what is
    computed for them is what is computed for it.

    Attributes:
        request: ``[trees]``, int64: index among the step's requests.
        context: ``[trees]``, int64: tokens before the root, all in the KV cache, all visible to every row.
        token: ``[trees, rows]``, int64: each row's index among the step's tokens.
        depth: ``[trees, rows]``, int64: the row's position is ``context + depth``.
        ancestors: ``[trees, rows, rows]``, bool: row i may attend to row j.

    """

    request: torch.Tensor
    context: torch.Tensor
    token: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor


class TreeMetadataBuilder:
    """Mixin for an attention-metadata builder that can mask trees.

    The model runner sets ``trees`` before each build; None is a step without branching trees.
    """

    trees: TreeQueries | None = None


class TreeAttention(Protocol):
    """What the model runner asks of an attention implementation besides vLLM's own interface."""

    def move_kv(
        self,
        layer: torch.nn.Module,
        kv_cache: torch.Tensor,
        source: torch.Tensor,  # [rows], int64, slots
        target: torch.Tensor,  # [rows], int64, slots
    ) -> None:
        """Copy the keys and values in the source slots to the target slots; all are read before any is written."""
