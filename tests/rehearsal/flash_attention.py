# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for FlashAttention 3's functions: dense, from the very metadata that vLLM's backend gives them."""

# torch reads the operator's annotations, so they must not be strings.

from typing import Any

import torch

VERSION = 3


def get_flash_attn_version(*args: Any, **kwargs: Any) -> int:
    return VERSION


def get_scheduler_metadata(
    *, batch_size: int, max_seqlen_q: int, causal: bool, num_splits: int, cache_seqlens: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Return a plan of the size that the real function returns; it says for which step it was made."""
    assert cache_seqlens.shape == (batch_size,)
    assert cache_seqlens.dtype == torch.int32
    plan = torch.zeros(1 + -(-batch_size // 4) * 4 * 4, dtype=torch.int32)
    plan[0] = planned_for(batch_size, max_seqlen_q, causal, num_splits)
    return plan


def planned_for(batch_size: int, max_seqlen_q: int, causal: bool, num_splits: int) -> int:
    return ((batch_size * 1000 + max_seqlen_q) * 2 + causal) * 1000 + num_splits


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
    num_splits: int,
    window_size: list[int] | None = None,
    return_softmax_lse: bool = False,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Attend from each request's tokens to its slots, in place, and return the log-sum-exp as well if asked."""
    assert fa_version == VERSION
    assert window_size in (None, [-1, -1])
    assert len(cu_seqlens_q) == len(seqused_k) + 1
    planned = planned_for(len(seqused_k), max_seqlen_q, causal, num_splits)
    lse = attend(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, block_table,
        scheduler_metadata, planned,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


@torch.library.custom_op("rehearsal::flash_attention", mutates_args=["out"])
def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    block_table: torch.Tensor,
    plan: torch.Tensor,
    planned: int,
) -> torch.Tensor:  # [heads, num_tokens], float32
    """One operator, so that a recorded graph holds it as one call and looks for nothing inside."""
    assert int(plan[0]) == planned, "the plan was made for another step"
    (num_tokens, heads, _), (_, block_size, kv_heads, _) = query.shape, key_cache.shape
    lse = torch.full((heads, num_tokens), torch.nan)
    for request, length in enumerate(seqused_k.tolist()):
        start, end = cu_seqlens_q[request : request + 2].tolist()
        if end == start:
            continue
        assert end - start <= max_seqlen_q
        assert length <= max_seqlen_k
        slot = torch.arange(length)
        block, place = block_table[request, slot // block_size].long(), slot % block_size
        key, value = (
            cache[block, place].float().repeat_interleave(heads // kv_heads, dim=1)
            for cache in (key_cache, value_cache)
        )
        scores = scale * torch.einsum("qhd,khd->hqk", query[start:end].float(), key)
        if causal:
            row = torch.arange(end - start)[:, None] + length - (end - start)
            scores.masked_fill_(slot > row, -torch.inf)
        lse[:, start:end] = scores.logsumexp(dim=-1)
        # Where there is no key, the real functions write zeros.
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).nan_to_num(), value)
    return lse
