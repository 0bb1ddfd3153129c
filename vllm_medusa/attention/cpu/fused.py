# SPDX-License-Identifier: Apache-2.0
"""Attention for trees by one fused op a layer (``tree_attention.cpp``), which reads the paged cache where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_medusa.step.trees import StepTrees


@dataclass(frozen=True, eq=False)
class FusedTrees:
    """Trees as the op reads them (a ``TreePass``); all tensors are contiguous.

    Requests without a branch, of one row even, are trees too, so that only prompts are left to vLLM's op.

    Attributes:
        block_table: ``[trees, columns]``, int32.
        context: ``[trees]``, int64: tokens before the root, all in the KV cache, all visible to every row.
        first_token: ``[trees]``, int64: the root's index among the step's tokens; the other rows follow it.
        num_rows: ``[trees]``, int64.
        depths: ``[tokens]``, int64: ``StepTrees.depths``.
        ancestor_bits: ``[tokens, words]``, int64: ``StepTrees.ancestor_bits``.

    """

    block_table: torch.Tensor
    context: torch.Tensor
    first_token: torch.Tensor
    num_rows: torch.Tensor
    depths: torch.Tensor
    ancestor_bits: torch.Tensor

    @classmethod
    def takes(cls, trees: StepTrees, common: CommonAttentionMetadata) -> torch.Tensor:
        """Return the requests whose tokens are rows, ``[trees]``, int64: all but prompts (see ``TreePass``)."""
        return (trees.cu_num_rows.diff() == common.query_start_loc_cpu.diff()).nonzero().flatten()

    @classmethod
    def of(
        cls,
        trees: StepTrees,
        common: CommonAttentionMetadata,
        requests: torch.Tensor,  # [trees], int64
        block_size: int,
    ) -> Self:
        """Prepare the trees of these requests."""
        # V2 has its indices in 32 bits.
        num_rows = trees.cu_num_rows.diff()[requests].long()
        return cls(
            block_table=common.block_table_tensor[requests].int(),
            context=common.seq_lens[requests].long() - num_rows,
            first_token=trees.logits_indices[trees.roots[requests]].long(),
            num_rows=num_rows,
            depths=trees.depths,
            ancestor_bits=trees.ancestor_bits,
        )

    def attend(
        self,
        layer: CPUAttentionBackendImpl,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        output: torch.Tensor,  # [tokens, heads, head_dim]
    ) -> None:
        """Write the output of the trees' rows."""
        torch.ops.vllm_medusa.tree_attention(
            query,
            kv_cache,
            output,
            self.block_table,
            self.context,
            self.first_token,
            self.num_rows,
            self.depths,
            self.ancestor_bits,
            layer.scale,
            layer.logits_soft_cap,
            layer.sliding_window,
            layer.alibi_slopes,
            None if layer.sinks is None else layer.sinks.float(),
        )
