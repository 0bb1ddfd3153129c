"""Commit, then forget: after it, the next step sees an ordinary sequence in the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.step.plan import StepPlan, kv_moves

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


class KVCommit(Protocol):
    """Moves the accepted rows' keys and values to the slots right behind the root, in every layer."""

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None: ...

    def __call__(
        self,
        plan: StepPlan,
        accepted: Walk,
        slots: Sequence[torch.Tensor],  # by KV cache group: [tokens], int64
    ) -> None:
        """Commit one step's walk; ``slots`` is where each of the step's tokens was written."""


class BackendCommit:
    """Moves rows through the attention backend's own cache-write path, whatever its cache looks like."""

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None:
        self._owners = cache_owners(kv_cache_config, layers)

    def __call__(
        self,
        plan: StepPlan,
        accepted: Walk,
        slots: Sequence[torch.Tensor],  # by KV cache group: [tokens], int64
    ) -> None:
        """Commit one step's walk (see ``KVCommit``)."""
        source, target = kv_moves(plan.trees, accepted.rows)
        if not len(source):
            return
        for owners, slot in zip(self._owners, slots, strict=True):
            source_slots, target_slots = slot[plan.token[source]], slot[plan.token[target]]
            for layer in owners:
                layer.impl.move_kv(layer, layer.kv_cache, source_slots, target_slots)


def cache_owners(kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> list[list[Any]]:
    """Return the layers of each KV cache group, of those that share a cache only the first."""
    return [
        list({layers[name].kv_cache.data_ptr(): layers[name] for name in reversed(group.layer_names)}.values())
        for group in kv_cache_config.kv_cache_groups
    ]
