# SPDX-License-Identifier: Apache-2.0
"""Commit, then forget: after it, the next step sees an ordinary sequence in the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.step.trees import StepTrees

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


class KVCommit(Protocol):
    """Moves the accepted rows' keys and values to the slots right behind the root, in every layer."""

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None: ...

    def __call__(
        self,
        trees: StepTrees,
        accepted: Walk,
        slots: Sequence[torch.Tensor],  # by KV cache group: [num_tokens], int64
    ) -> None:
        """Commit one step's walk; ``slots`` is where each of the step's tokens was written."""


class BackendCommit:
    """Moves rows through the attention backend's own cache-write path, whatever its cache looks like."""

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None:
        self._owners = cache_owners(kv_cache_config, layers)

    def __call__(
        self,
        trees: StepTrees,
        accepted: Walk,
        slots: Sequence[torch.Tensor],  # by KV cache group: [num_tokens], int64
    ) -> None:
        """Commit one step's walk (see ``KVCommit``)."""
        source, destination = misplaced_rows(trees, accepted)
        if not len(source):
            return
        for owners, slot in zip(self._owners, slots, strict=True):
            source_slots, destination_slots = (slot[trees.logits_indices[rows]] for rows in (source, destination))
            for layer in owners:
                layer.impl.move_kv(layer, layer.kv_cache, source_slots, destination_slots)


def cache_owners(kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> list[list[Any]]:
    """Return the layers of each KV cache group, of those that share a cache only the first."""
    return [
        list({layers[name].kv_cache.data_ptr(): layers[name] for name in reversed(group.layer_names)}.values())
        for group in kv_cache_config.kv_cache_groups
    ]


def misplaced_rows(trees: StepTrees, accepted: Walk) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the keys and values of accepted rows lie, and where an ordinary sequence has them.

    The row accepted at level j belongs right behind the root, j rows further on; in a chain it is there already.

    Returns:
        Two vectors of rows, int64: source and destination of each row that has to move.

    """
    rows = accepted.rows
    destination = trees.roots[:, None] + torch.arange(rows.shape[1], device=rows.device)
    misplaced = (rows >= 0) & (rows != destination)
    return rows[misplaced], destination[misplaced]
