"""What a step's branching trees look like to attention, and how a metadata builder learns of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_medusa.tree.layout import TreeLayout

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup


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


@dataclass(frozen=True, eq=False)
class TreeRows:
    """Where the rows of a step's trees are.

    Attributes:
        layout: the step's trees.
        token: ``[rows]``, int64: each row's index among the step's tokens.
        seq_lens: ``[requests]``, int: each request's tokens after this step, all of its rows counted.

    """

    layout: TreeLayout
    token: torch.Tensor
    seq_lens: torch.Tensor

    @cached_property
    def queries(self) -> TreeQueries | None:
        """The trees that branch, side by side; None if none does."""
        if (branching := self.layout.branching) is None:
            return None
        return TreeQueries(
            request=branching.rows.request,
            context=self.seq_lens[branching.rows.request].long() - branching.rows.length,
            token=self.token[branching.rows.row],
            depth=branching.depth,
            ancestors=branching.ancestors,
        )


class TreeMetadataBuilder:
    """Mixin for an attention-metadata builder that can mask trees.

    The model runner announces each step's rows before the build; None is a step that is none, such as a warm-up.
    """

    rows: TreeRows | None = None


def announce_trees(groups: Iterable[AttentionGroup], rows: TreeRows | None) -> None:
    """Tell the metadata builders of all attention groups what the next build is for."""
    for group in groups:
        for builder in group.metadata_builders:
            if isinstance(builder, TreeMetadataBuilder):
                builder.rows = rows


def check_backends(groups: Iterable[AttentionGroup]) -> None:
    """Refuse layers whose attention cannot take a tree mask, at start-up.

    vLLM derives a backend's builder for special layers (chunked local attention, for one) from the platform's; such a
    builder rearranges the batch before ours would see it, so only one that is ours itself will do.

    Raises:
        ValueError: naming the layer and its backend.

    """
    for group in groups:
        for builder in group.metadata_builders:
            if TreeMetadataBuilder not in type(builder).__bases__:
                raise ValueError(
                    f"medusa_tree: layer {group.layer_names[0]!r} attends through {group.backend.__qualname__}, which "
                    'cannot take the mask of a branching tree; give medusa_tree "chain"'
                )


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
