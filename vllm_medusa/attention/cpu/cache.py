# SPDX-License-Identifier: Apache-2.0
"""The layout of vLLM's KV cache on CPUs, as far as we read it."""

from __future__ import annotations

import torch

READABLE_ISAS = ("vec", "vec16")
"""Instruction sets whose cache layout we read: keys ``[head_dim, block_size]`` in each block, values ``[block_size,
head_dim]``. The others pack keys in tiles of their own."""


def views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View a cache as keys, ``[blocks, kv_heads, head_dim, block_size]``, and values, the last two exchanged."""
    num_blocks, kv_heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(num_blocks, kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    keys = keys.flatten(2).unflatten(2, (-1, block_size))
    return keys, values
