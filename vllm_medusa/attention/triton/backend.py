# SPDX-License-Identifier: Apache-2.0
"""What the tree backends for GPUs share: requests that verify a draft go to our kernel, the others to vLLM's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_medusa.attention.metadata import TreeMetadataBuilder
from vllm_medusa.attention.triton.ops import AttentionStep, LayerOptions, Workspace, tree_attention
from vllm_medusa.attention.triton.tiling import Gpu
from vllm_medusa.step.trees import StepTrees


@dataclass(frozen=True, eq=False)
class TreeAttentionMetadata:
    """A step of two parts: its first tokens belong to requests that verify a draft, the others do not.

    Attributes:
        step: which keys the first tokens see.
        num_tokens: how many these are.
        workspace: what the kernel writes in between.
        native: vLLM's metadata for the other tokens; None if there are none.
        contexts: how the backend attends to the first tokens' contexts by itself; None if it leaves them to our kernel.

    """

    step: AttentionStep
    num_tokens: int
    workspace: Workspace
    native: Any | None
    contexts: Any | None


class TreeBuilderMixin(TreeMetadataBuilder):
    """Splits a step between our kernel and the native backend.

    vLLM's V2 runner sorts requests with drafts to the front, so the split is at one place, known on the host even where
    only the device knows how many rows each of them has. The trees lie in buffers that stay where they are: a CUDA
    graph of decodes, which is all ours, reads them in replay.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self._max_rows = vllm_config.num_speculative_tokens + 1
        dtype = vllm_config.model_config.dtype
        self._workspace = Workspace.allocate(kv_cache_spec.head_size, dtype, Gpu.of(device), device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Whole graphs for decodes; steps that the native backend has a part in are captured piecewise."""
        return AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int | None:
        """Such a graph takes any number of rows of each request, up to the whole tree's."""
        return vllm_config.num_speculative_tokens + 1

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> TreeAttentionMetadata:
        """Build for the capture of a step in which every token is a row, or for a dummy run of its graph."""
        common, trees = common_attn_metadata, self.trees
        assert trees is not None
        # A dummy run derives no trees, and is to attend to its contexts as long as a real step does.
        contexts = common.seq_lens - common.query_start_loc.diff()
        trees.root_positions[: common.num_reqs].copy_(contexts)
        return self._ours(common, common.num_reqs, common.num_actual_tokens, native=None)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Build vLLM's own metadata, or in a step that verifies drafts ours, around it where both have a part."""
        trees, common = self.trees, common_attn_metadata
        if trees is None or not (trees.num_drafting_reqs or self.lengths_vary):
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        start, requests = common.query_start_loc_cpu.numpy(), trees.num_drafting_reqs
        if start[common.num_reqs] == len(trees.logits_indices):
            # All tokens are rows; with the padding, for which a captured graph has been given its sizes.
            return self._ours(common, common.num_reqs, common.num_actual_tokens, native=None)
        if not requests:
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        tokens = int(start[requests])
        native = super().build(0, _behind(common, requests, tokens), fast_build)  # type: ignore[misc]
        return self._ours(common, requests, tokens, native)

    def _ours(
        self, common: CommonAttentionMetadata, requests: int, tokens: int, native: Any | None
    ) -> TreeAttentionMetadata:
        assert self.trees is not None
        step = AttentionStep(
            query_start_loc=common.query_start_loc[: requests + 1],
            seq_lens=common.seq_lens[:requests],
            block_table=common.block_table_tensor[:requests],
            ancestor_bits=self.trees.ancestor_bits[:tokens],
            depths=self.trees.depths[:tokens],
            max_rows=self._max_rows,
        )
        contexts = self._plan_contexts(step, self.trees, common.max_seq_len)
        return TreeAttentionMetadata(step, tokens, self._workspace, native, contexts)

    def _plan_contexts(self, step: AttentionStep, trees: StepTrees, max_seq_len: int) -> Any | None:
        """Prepare what the implementation's ``_attend_contexts`` needs; by default it does nothing."""
        return None


class TreeImplMixin:
    """Attends with our kernel where a step verifies drafts, natively elsewhere.

    Raises:
        ValueError: the layer needs what the kernel has not.

    """

    alibi_slopes: torch.Tensor | None
    attn_type: str
    head_size: int
    kv_cache_dtype: str
    logits_soft_cap: float | None
    scale: float
    sinks: torch.Tensor | None
    sliding_window: tuple[int, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unsupported = {
            "ALiBi": self.alibi_slopes is not None,
            "chunked local attention": getattr(self, "chunk_lookback", -1) >= 0,
            "attention other than a decoder's": self.attn_type != AttentionType.DECODER,
        }
        for what, used in unsupported.items():
            if used:
                raise ValueError(
                    f"medusa_tree: a branching tree cannot be verified with {what} on this device; "
                    'give medusa_tree "chain"'
                )
        self._options: LayerOptions | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Our kernel writes what it computes, unquantised."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        key: torch.Tensor | None,  # [tokens, kv_heads, head_dim]; None where the cache is another layer's
        value: torch.Tensor | None,  # [tokens, kv_heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        attn_metadata: Any,
        output: torch.Tensor,  # [tokens, heads, head_dim]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend as the native implementation does, under the step's tree masks."""
        native, own = super().forward, attn_metadata  # type: ignore[misc]
        if not isinstance(own, TreeAttentionMetadata):
            return native(layer, query, key, value, kv_cache, own, output, output_scale, output_block_scale)
        first = own.num_tokens
        if own.native is not None:
            key, value = (each[first:] if each is not None else None for each in (key, value))
            native(layer, query[first:], key, value, kv_cache, own.native, output[first:])
        key_cache, value_cache = self._caches(kv_cache)
        if self._options is None:
            self._options = self._layer_options(layer, query.dtype)
        ours, result = query[:first], output[:first]
        context_lse = self._attend_contexts(layer, ours, key_cache, value_cache, result, own)
        tree_attention(ours, key_cache, value_cache, result, own.step, self._options, own.workspace, context_lse)
        return output

    def _attend_contexts(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, heads, head_dim]
        key_cache: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
        value_cache: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim]
        output: torch.Tensor,  # [num_tokens, heads, head_dim]
        metadata: TreeAttentionMetadata,
    ) -> torch.Tensor | None:  # [heads, num_tokens], float32
        """Attend from the rows of trees to their contexts, into ``output``; return ``tree_attention``'s context_lse."""
        return None

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """View a cache as keys and values, ``[blocks, block_size, kv_heads, head_dim]`` each."""
        if self.kv_cache_dtype.startswith("fp8"):
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return key_cache, value_cache

    def _layer_options(self, layer: Any, query_dtype: torch.dtype) -> LayerOptions:
        is_quantised = self.kv_cache_dtype.startswith("fp8")
        behind, _ = self.sliding_window
        return LayerOptions(
            scale=self.scale,
            soft_cap=self.logits_soft_cap or None,
            window=behind + 1 if behind >= 0 else None,
            sinks=self.sinks,
            # Where FlashAttention wants queries as the cache is, the layer quantises those of all requests.
            query_scale=layer._q_scale if query_dtype == current_platform.fp8_dtype() else None,
            key_scale=layer._k_scale if is_quantised else None,
            value_scale=layer._v_scale if is_quantised else None,
        )


def _behind(common: CommonAttentionMetadata, requests: int, tokens: int) -> CommonAttentionMetadata:
    """Return the metadata of a step without its first requests, which have its first tokens."""
    start_cpu = common.query_start_loc_cpu[requests:] - tokens
    optional = {
        name: value[requests:] if (value := getattr(common, name)) is not None else None
        for name in ("is_prefilling", "seq_lens_cpu_upper_bound", "rswa_prefix_lens", "req_idx")
    }
    ranges = common.mm_req_doc_ranges
    return replace(
        common,
        query_start_loc=common.query_start_loc[requests:] - tokens,
        query_start_loc_cpu=start_cpu,
        seq_lens=common.seq_lens[requests:],
        num_reqs=common.num_reqs - requests,
        num_actual_tokens=common.num_actual_tokens - tokens,
        max_query_len=int(np.diff(start_cpu.numpy()).max()),
        block_table_tensor=common.block_table_tensor[requests:],
        slot_mapping=common.slot_mapping[tokens:],
        positions=common.positions[tokens:] if common.positions is not None else None,
        mm_req_doc_ranges={index - requests: each for index, each in ranges.items() if index >= requests}
        if ranges is not None
        else None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **optional,
    )
