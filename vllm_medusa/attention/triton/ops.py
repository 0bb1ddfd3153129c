# SPDX-License-Identifier: Apache-2.0
"""Tree attention for GPUs: one call attends for a mixed batch of draft trees, chains and prefill chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import cdiv, next_power_of_2

from vllm_medusa.attention.triton.kernels import attend_kernel, merge_kernel
from vllm_medusa.attention.triton.tiling import (
    MAX_BLOCK_ROWS,
    MIN_DOT,
    MIN_WARPS,
    WARPS_PER_PROCESSOR,
    Gpu,
    Tiling,
    choose_tiling,
)


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """Which keys the tokens of one step see; the same for every layer of a KV cache group.

    A request's rows follow one another. In a request of r rows and context ``c = seq_len - r``, row i has slot c + i,
    its key written already. All rows of a request are causal, or all are a tree's. Tokens past ``query_start_loc[-1]``
    and requests without rows are padding, for which nothing is written.

    Attributes:
        query_start_loc: ``[num_reqs + 1]``, int32: each request's first row among the tokens.
        seq_lens: ``[num_reqs]``, int32: context and rows.
        block_table: ``[num_reqs, blocks]``, int32.
        ancestor_bits: ``[num_tokens, words]``, int64, contiguous: ``StepTrees.ancestor_bits``.
        depths: ``[num_tokens]``, int32 or int64, contiguous: ``StepTrees.depths``.
        max_rows: at least the rows of the request with most, known on the host.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    ancestor_bits: torch.Tensor
    depths: torch.Tensor
    max_rows: int

    @property
    def least_reqs(self) -> int:
        """The fewest requests that so many tokens can belong to; others may be padding, or have a row or two."""
        return min(cdiv(len(self.ancestor_bits), self.max_rows), len(self.seq_lens))


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """How a layer attends.

    Attributes:
        scale: the scores' factor.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        window: a row sees only keys fewer than this many positions before its own.
        sinks: ``[heads]``: score of a further key, seen by every row, whose value is zero.
        query_scale: scalar or ``[kv_heads]``, float32: what quantised queries are to be multiplied by.
        key_scale: the same for a quantised cache's keys.
        value_scale: the same for its values.

    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Workspace:
    """What the kernels write between them, allocated once for all layers and steps.

    Attributes:
        partial: ``[stretches, head_dim]``, of the output's dtype: each is rounded as the output is.
        log_total: ``[stretches]``, float32.
        gpu: what the kernels run on.

    """

    partial: torch.Tensor
    log_total: torch.Tensor
    gpu: Gpu

    @classmethod
    def allocate(cls, head_dim: int, dtype: torch.dtype, gpu: Gpu, device: torch.device) -> Workspace:
        """Allocate for steps of any size."""
        stretches = gpu.processors * WARPS_PER_PROCESSOR // MIN_WARPS * MAX_BLOCK_ROWS
        return cls(
            partial=torch.empty(stretches, head_dim, dtype=dtype, device=device),
            log_total=torch.empty(stretches, dtype=torch.float32, device=device),
            gpu=gpu,
        )


def tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    step: AttentionStep,
    options: LayerOptions,
    workspace: Workspace,
    context_lse: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Attend from each of a step's rows to the keys that it sees, in one launch or, with splits, two.

    Scores and sums are float32; products are taken in the output's dtype. Nothing waits for the device.

    Args:
        query: ``[num_tokens, heads, head_dim]``, of the output's dtype or an eight-bit float; the last stride is 1, as
            in all below.
        key_cache: ``[blocks, block_size, kv_heads, head_dim]``, the same.
        value_cache: the same.
        output: ``[num_tokens, heads, head_dim]``, float32, float16 or bfloat16, written in place.
        step: which keys each token sees.
        options: how the layer attends.
        workspace: of the layer's head_dim.
        context_lse: ``[heads, num_tokens]``, float32: the output holds each row's attention to its request's context
            already, this is the natural log of that one's sum of exponentials, and only the request's own rows are
            left. Of requests without a context neither is read. Not with a window, not with splits.
        tiling: ``choose_tiling``'s by default.

    """
    (num_tokens, heads, head_dim), (num_reqs,) = query.shape, step.seq_lens.shape
    _, block_size, kv_heads, _ = key_cache.shape
    if tiling is None:
        tiling = choose_tiling(
            num_tokens,
            step.least_reqs,
            step.max_rows,
            heads,
            kv_heads,
            head_dim,
            output.element_size(),
            key_cache.element_size(),
            workspace.gpu,
            own_rows_only=context_lse is not None,
            bends_scores=options.window is not None or options.soft_cap is not None,
        )
    attend_kernel[(tiling.num_blocks(num_tokens, num_reqs, heads // kv_heads), kv_heads, tiling.splits)](
        query,
        key_cache,
        value_cache,
        output,
        context_lse,
        workspace.partial,
        workspace.log_total,
        step.query_start_loc,
        step.seq_lens,
        step.block_table,
        step.ancestor_bits,
        step.depths,
        options.sinks,
        options.query_scale,
        options.key_scale,
        options.value_scale,
        options.scale,
        options.soft_cap or 0.0,
        num_reqs,
        tiling.splits,
        query.stride(0),
        query.stride(1),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        output.stride(0),
        output.stride(1),
        context_lse.stride(0) if context_lse is not None else 0,
        step.block_table.stride(0),
        _head_stride(options.query_scale),
        _head_stride(options.key_scale),
        _head_stride(options.value_scale),
        head_dim=head_dim,
        padded_dim=max(next_power_of_2(head_dim), MIN_DOT),
        group=heads // kv_heads,
        block_size=block_size,
        words=step.ancestor_bits.shape[1],
        window=options.window or 0,
        capped=options.soft_cap is not None,
        is_split=tiling.splits > 1,
        block_rows=tiling.block_rows,
        tile=tiling.tile,
        stages=tiling.stages,
        num_warps=tiling.warps,
    )
    if tiling.splits > 1:
        merge_kernel[(num_tokens, heads)](
            workspace.partial,
            workspace.log_total,
            output,
            step.query_start_loc,
            num_reqs,
            tiling.splits,
            output.stride(0),
            output.stride(1),
            head_dim=head_dim,
            padded_dim=next_power_of_2(head_dim),
            padded_splits=next_power_of_2(tiling.splits),
            num_warps=1,
        )


def _head_stride(scale: torch.Tensor | None) -> int:
    """Return how far apart the scales of two KV heads lie."""
    return scale.stride(0) if scale is not None and scale.numel() > 1 else 0
