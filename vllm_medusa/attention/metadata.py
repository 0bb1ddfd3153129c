# SPDX-License-Identifier: Apache-2.0
"""How attention learns of a step's trees, and what the model runners ask of an attention backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from vllm_medusa.step.trees import StepTrees

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup


class TreeMetadataBuilder:
    """Mixin for an attention-metadata builder that can mask trees.

    Attributes:
        trees: the trees of the step that is built for next, set by the model runner; None where nothing is verified.
        lengths_vary: whether only the device knows how many rows each request has, and CUDA graphs of decode steps take
            any; set by the model runner.

    """

    trees: StepTrees | None = None
    lengths_vary: bool = False

    def prepare_for_branches(self) -> None:
        """Make ready for branching trees, once, at the engine's start; a builder overrides it if it has to."""


class TreeBackendMixin:
    """The two accessors that vLLM asks a backend for. A backend keeps the name by which vLLM knows its layouts."""

    tree_impl: ClassVar[type]
    tree_builder: ClassVar[type]

    @classmethod
    def get_impl_cls(cls) -> type:
        return cls.tree_impl

    @classmethod
    def get_builder_cls(cls) -> type:
        return cls.tree_builder


def tree_builders(groups: Iterable[AttentionGroup]) -> Iterator[TreeMetadataBuilder]:
    """Yield the metadata builders of all attention groups that can mask trees."""
    for group in groups:
        for builder in group.metadata_builders:
            if isinstance(builder, TreeMetadataBuilder):
                yield builder


def announce_trees(groups: Iterable[AttentionGroup], trees: StepTrees | None) -> None:
    """Tell the metadata builders of all attention groups what the next build is for."""
    for builder in tree_builders(groups):
        builder.trees = trees


def prepare_backends(groups: Iterable[AttentionGroup]) -> None:
    """Make attention ready for branching trees at start-up, or refuse layers that cannot take a tree mask.

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
            builder.prepare_for_branches()


class TreeAttention(Protocol):
    """What the KV commit asks of an attention implementation besides vLLM's own interface."""

    def move_kv(
        self,
        layer: torch.nn.Module,
        kv_cache: torch.Tensor,
        source: torch.Tensor,  # [rows], int64, slots
        destination: torch.Tensor,  # [rows], int64, slots
    ) -> None:
        """Copy the keys and values in the source slots to the destinations; all are read before any is written."""
