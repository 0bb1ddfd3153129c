# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for FlashAttention 3's functions: dense, from the very metadata that vLLM's backend gives them."""

from __future__ import annotations

from typing import Any

import torch

from vllm_medusa.attention.reference import tree_attention

VERSION = 3


def get_flash_attn_version(*args: Any, **kwargs: Any) -> int:
    return VERSION


def get_scheduler_metadata(*, batch_size: int, max_seqlen_q: int, **kwargs: Any) -> torch.Tensor:
    """Return a plan of the size that the real function returns; it says for which step it was made."""
    plan = torch.zeros(1 + -(-batch_size // 4) * 4 * 4, dtype=torch.int32)
    plan[0] = batch_size * 1000 + max_seqlen_q
    return plan


def flash_attn_varlen_func(
    *,
    q: torch.Tensor,  # [num_tokens, heads, head_dim]
    k: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
    v: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
    out: torch.Tensor,  # [num_tokens, heads, head_dim]
    cu_seqlens_q: torch.Tensor,  # [num_reqs + 1]
    max_seqlen_q: int,
    seqused_k: torch.Tensor,  # [num_reqs]
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,  # [num_reqs, blocks]
    scheduler_metadata: torch.Tensor,
    fa_version: int,
    window_size: list[int] | None = None,
    **unused: Any,
) -> None:
    """Attend causally from each request's tokens to its slots, in place."""
    assert causal
    assert fa_version == VERSION
    assert window_size in (None, [-1, -1])
    num_reqs = len(seqused_k)
    assert len(cu_seqlens_q) == num_reqs + 1
    assert int(scheduler_metadata[0]) == num_reqs * 1000 + max_seqlen_q, "the plan was made for another step"
    for request in range(num_reqs):
        start, end = cu_seqlens_q[request : request + 2].tolist()
        length = int(seqused_k[request])
        assert end - start <= max_seqlen_q
        assert length <= max_seqlen_k
        if end == start:
            continue
        slot = torch.arange(length)
        block, place = block_table[request, slot // k.shape[1]].long(), slot % k.shape[1]
        keys, values, context = k[block, place], v[block, place], length - (end - start)
        out[start:end] = tree_attention(
            q[start:end],
            keys[:context],
            values[:context],
            keys[context:],
            values[context:],
            torch.ones(end - start, end - start).tril().bool(),
            softmax_scale,
        )
