"""Commit, then forget: after it, the next step sees an ordinary sequence in the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.runner.step import StepPlan, kv_moves


class KVCommit:
    """Moves the accepted rows' keys and values to the slots right behind the root, in every layer."""

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None:
        # A layer that shares another's cache must not move its rows a second time.
        self._owners = [
            {layers[name].kv_cache.data_ptr(): layers[name] for name in reversed(group.layer_names)}
            for group in kv_cache_config.kv_cache_groups
        ]

    def __call__(
        self,
        plan: StepPlan,
        accepted: Walk,
        slots: Sequence[torch.Tensor],  # by KV cache group: [tokens], int64
    ) -> None:
        """Commit one step's walk; ``slots`` is where each of the step's tokens was written."""
        source, target = kv_moves(plan.trees, accepted.rows)
        if not len(source):
            return
        for owners, slot in zip(self._owners, slots, strict=True):
            source_slots, target_slots = slot[plan.token[source]], slot[plan.token[target]]
            for layer in owners.values():
                layer.impl.move_kv(layer, layer.kv_cache, source_slots, target_slots)
