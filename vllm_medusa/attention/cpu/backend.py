# SPDX-License-Identifier: Apache-2.0
"""Tree attention for CPUs: vLLM's ``CPU_ATTN``, with a pass of our own for rows of trees."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_medusa.attention.cpu.cache import READABLE_ISAS, views
from vllm_medusa.attention.cpu.padded import PaddedTrees
from vllm_medusa.attention.cpu.selection import selected_pass
from vllm_medusa.attention.cpu.tree_pass import TreePass
from vllm_medusa.attention.metadata import TreeBackendMixin, TreeMetadataBuilder
from vllm_medusa.compat.backends import overridden


def tree_attention_selected() -> AbstractContextManager[None]:
    """Make layers that are constructed in this context use the tree backend: the CPU platform always says CPU_ATTN."""
    return overridden({AttentionBackendEnum.CPU_ATTN: TreeCPUAttentionBackend})


@dataclass(frozen=True, eq=False)
class NativeTokens:
    """The tokens of a step that vLLM's own op takes.

    Attributes:
        token_indices: ``[native]``, int64: their indices among all tokens.
        metadata: vLLM's metadata for them.

    """

    token_indices: torch.Tensor
    metadata: CPUAttentionMetadata


@dataclass(frozen=True, eq=False)
class TreeCPUAttentionMetadata:
    """What a step with branching trees needs.

    Attributes:
        trees: the requests that our own pass takes.
        native: all other requests; None if there are none.

    """

    trees: TreePass
    native: NativeTokens | None


class TreeCPUAttentionMetadataBuilder(TreeMetadataBuilder, CPUAttentionMetadataBuilder):
    """Splits a step between the native op and the tree pass, request by request.

    Attributes:
        tree_pass: the way to attend for trees.

    """

    isa: str
    tree_pass: type[TreePass] = PaddedTrees

    def prepare_for_branches(self) -> None:
        """Choose the tree pass."""
        self.tree_pass = selected_pass()

    def _set_isa_to_layers(self, layer_names: list[str]) -> None:
        if self.isa == "amx":
            self.isa = "vec"
        if self.isa not in READABLE_ISAS:
            raise ValueError(
                f"medusa_tree: attention on this CPU uses the instruction set {self.isa!r}, and a branching tree can "
                f'read the KV cache of {READABLE_ISAS} only; give medusa_tree "chain"'
            )
        super()._set_isa_to_layers(layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata | TreeCPUAttentionMetadata:
        """Build vLLM's own metadata, or in a step with branching trees ours around it."""
        trees, common = self.trees, common_attn_metadata
        if trees is None or not len(trees.branching_reqs()):
            return super().build(common_prefix_len, common, fast_build)
        requests = self.tree_pass.takes(trees, common)
        native = None
        if len(requests) < common.num_reqs:
            is_native = torch.ones(common.num_reqs, dtype=torch.bool)
            is_native[requests] = False
            native_common, native_tokens = _select(common, is_native.nonzero().flatten())
            native = NativeTokens(native_tokens, super().build(common_prefix_len, native_common, fast_build))
        return TreeCPUAttentionMetadata(self.tree_pass.of(trees, common, requests, self.block_size), native)


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """Attention over context and ancestors for rows of trees, vLLM's op for all others."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        key: torch.Tensor,  # [tokens, kv_heads, head_dim]
        value: torch.Tensor,  # [tokens, kv_heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        attn_metadata: CPUAttentionMetadata | TreeCPUAttentionMetadata | None,
        output: torch.Tensor,  # [tokens, heads, head_dim]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend as ``CPUAttentionBackendImpl.forward`` does, under the step's tree masks."""
        if not isinstance(attn_metadata, TreeCPUAttentionMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if (native := attn_metadata.native) is not None:
            native_query = query[native.token_indices]
            native_output = torch.empty_like(native_query)
            super().forward(layer, native_query, key, value, kv_cache, native.metadata, native_output)
            output[native.token_indices] = native_output
        attn_metadata.trees.attend(self, query, kv_cache, output)
        return output

    def move_kv(
        self,
        layer: torch.nn.Module,
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        source: torch.Tensor,  # [rows], int64, slots
        destination: torch.Tensor,  # [rows], int64, slots
    ) -> None:
        """Copy keys and values between slots; the write is the backend's own (see ``TreeAttention.move_kv``)."""
        keys, values = views(kv_cache)
        block, offset = source // kv_cache.shape[2], source % kv_cache.shape[2]
        self.do_kv_cache_update(layer, keys[block, :, :, offset], values[block, :, offset], kv_cache, destination)


class TreeCPUAttentionBackend(TreeBackendMixin, CPUAttentionBackend):
    """``CPU_ATTN`` with tree masks."""

    tree_impl, tree_builder = TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder


def _select(
    common: CommonAttentionMetadata,
    requests: torch.Tensor,  # [selected], int64
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """Return the metadata of some of a step's requests, and the indices of their tokens."""
    start = common.query_start_loc_cpu.long()
    lengths = (start[1:] - start[:-1])[requests]
    new_start = torch.zeros(len(requests) + 1, dtype=common.query_start_loc.dtype)
    torch.cumsum(lengths, 0, out=new_start[1:])
    total = int(new_start[-1])
    shift = (start[:-1][requests] - new_start[:-1]).repeat_interleave(lengths)
    selected = replace(
        common,
        num_reqs=len(requests),
        num_actual_tokens=total,
        max_query_len=int(lengths.max()),
        query_start_loc=new_start,
        query_start_loc_cpu=new_start,
        seq_lens=common.seq_lens[requests],
        block_table_tensor=common.block_table_tensor[requests],
    )
    return selected, torch.arange(total) + shift
