# SPDX-License-Identifier: Apache-2.0
"""FlashAttention with tree masks.

All rows of a tree see the whole context, so that part needs no mask: FlashAttention 3 attends to it, at its own speed,
and our kernel adds the tree's own rows. Our kernel does both in layers with a window, where a row's depth decides what
it sees, and under FlashAttention 2, which splits no context among processors when a request has several rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv, round_up
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_medusa.attention.metadata import TreeBackendMixin, TreeMetadataBuilder
from vllm_medusa.attention.triton.backend import TreeAttentionMetadata, TreeBuilderMixin, TreeImplMixin
from vllm_medusa.attention.triton.ops import AttentionStep
from vllm_medusa.step.trees import StepTrees

SPLITTING_VERSION = 3
"""The FlashAttention that plans a step ahead and splits contexts among processors."""

EVERYWHERE = (-1, -1)
"""The window of a layer that has none."""

BLOCK_ROWS = 128
"""Rows times heads that one program of FlashAttention 3 attends from."""


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """How FlashAttention is to attend to a step's contexts. The tensors stay where they are from step to step.

    Attributes:
        lengths: ``[num_reqs]``, int32: each request's context; of no meaning for padding, which has no rows.
        max_length: at least the longest.
        max_splits: into how many stretches a context may be cut.
        schedule: vLLM's ``scheduler_metadata``.

    """

    lengths: torch.Tensor
    max_length: int
    max_splits: int
    schedule: torch.Tensor


class TreeFlashAttentionMetadataBuilder(
    TreeBuilderMixin, TreeMetadataBuilder, flash_attn.FlashAttentionMetadataBuilder
):
    """FlashAttention's builder with tree masks, and with a plan for the contexts that its layers attend to."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self._plans_contexts = any(layers[name].impl.attends_to_contexts for name in layer_names)
        # As vLLM sizes its own: a counter, and four numbers a request.
        length = 1 + 4 * round_up(vllm_config.scheduler_config.max_num_seqs, 4)
        self._schedule = torch.zeros(length, dtype=torch.int32, device=device)

    def _plan_contexts(self, step: AttentionStep, trees: StepTrees, max_seq_len: int) -> ContextPlan | None:
        if not self._plans_contexts:
            return None
        num_reqs, rows = len(step.seq_lens), step.max_rows * (self.num_heads_q // self.num_heads_kv)
        programs = step.least_reqs * cdiv(rows, BLOCK_ROWS) * self.num_heads_kv
        most_splits = self.attention_config.flash_attn_max_num_splits_for_cuda_graph
        max_splits = min(cdiv(self._workspace.gpu.processors, programs), most_splits)
        is_quantised = self.cache_config.cache_dtype.startswith("fp8")
        lengths = trees.root_positions[:num_reqs]
        planned = flash_attn.get_scheduler_metadata(
            batch_size=num_reqs,
            max_seqlen_q=step.max_rows,
            max_seqlen_k=max_seq_len,
            num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv,
            headdim=self.headdim,
            cache_seqlens=lengths,
            qkv_dtype=current_platform.fp8_dtype() if is_quantised else self.kv_cache_dtype,
            cu_seqlens_q=step.query_start_loc,
            page_size=self.block_size,
            causal=False,
            num_splits=max_splits,
        )
        # What is past the plan must be zero (see vLLM's _store_scheduler_metadata).
        self._schedule.zero_()
        schedule = self._schedule[: len(planned)].copy_(planned)
        return ContextPlan(lengths, max_seq_len, max_splits, schedule)


class TreeFlashAttentionImpl(TreeImplMixin, flash_attn.FlashAttentionImpl):
    """FlashAttention for prompts, plain decodes, and the contexts of trees."""

    @property
    def attends_to_contexts(self) -> bool:
        """Whether FlashAttention attends to contexts in this layer, as the module says."""
        return self.vllm_flash_attn_version == SPLITTING_VERSION and self.sliding_window == EVERYWHERE

    def _attend_contexts(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, heads, head_dim]
        key_cache: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
        value_cache: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
        output: torch.Tensor,  # [num_tokens, heads, head_dim]
        metadata: TreeAttentionMetadata,
    ) -> torch.Tensor | None:
        if not self.attends_to_contexts:
            return None
        step, contexts = metadata.step, metadata.contexts
        assert contexts is not None
        by_head = len(contexts.lengths), self.num_kv_heads
        _, lse = flash_attn.flash_attn_varlen_func(
            q=query,
            # Where a cache has one KV head its strides may be of no use to FlashAttention, as vLLM's own forward says.
            k=canonicalize_singleton_dim_strides(key_cache),
            v=canonicalize_singleton_dim_strides(value_cache),
            out=output,
            cu_seqlens_q=step.query_start_loc,
            max_seqlen_q=step.max_rows,
            seqused_k=contexts.lengths,
            max_seqlen_k=contexts.max_length,
            softmax_scale=self.scale,
            causal=False,
            block_table=step.block_table,
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            scheduler_metadata=contexts.schedule,
            fa_version=SPLITTING_VERSION,
            q_descale=layer._q_scale.expand(by_head) if self.supports_quant_query_input else None,
            k_descale=layer._k_scale.expand(by_head),
            v_descale=layer._v_scale.expand(by_head),
            num_splits=contexts.max_splits,
        )
        return lse


class TreeFlashAttentionBackend(TreeBackendMixin, flash_attn.FlashAttentionBackend):
    """FlashAttention with tree masks."""

    tree_impl, tree_builder = TreeFlashAttentionImpl, TreeFlashAttentionMetadataBuilder
