"""Tree attention for CPUs: vLLM's ``CPU_ATTN``, with a masked pass over the paged cache for rows of branching trees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_medusa.attention.metadata import TreeMetadataBuilder, TreeQueries

READABLE_ISAS = ("vec", "vec16")
"""Instruction sets whose cache layout we read: keys ``[head_dim, block_size]`` in each block, values ``[block_size,
head_dim]``. The others pack keys in tiles of their own."""


@contextmanager
def tree_attention_selected() -> Iterator[None]:
    """Make layers that are constructed in this context use the tree backend where they would use ``CPU_ATTN``.

    The CPU platform answers ``CPU_ATTN`` to every request, so the registry's override is the way in; it is lifted again
    for the sake of other engines in the process.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{TreeCPUAttentionBackend.__name__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


@dataclass(frozen=True, eq=False)
class TreeCPUAttentionMetadata:
    """What a step with branching trees needs.

    Attributes:
        trees: the branching trees.
        blocks: ``[trees, blocks]``, int64: the cache blocks that hold each tree's context.
        block_size: tokens per block.
        native_tokens: ``[native]``, int64: indices of all other tokens.
        native: vLLM's metadata for them; None if there are none.

    """

    trees: TreeQueries
    blocks: torch.Tensor
    block_size: int
    native_tokens: torch.Tensor
    native: CPUAttentionMetadata | None

    @cached_property
    def key_position(self) -> torch.Tensor:
        """``[blocks, block_size]``, int64: positions of the context's keys."""
        return torch.arange(self.blocks.shape[1] * self.block_size).view(-1, self.block_size)

    @cached_property
    def query_position(self) -> torch.Tensor:
        """``[trees, rows]``, int64: positions of the trees' rows."""
        return self.trees.context[:, None] + self.trees.depth

    def biases(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is added to the scores, 0 or -inf, for a sliding window of that many positions (-1: none).

        Returns:
            ``[trees, blocks, 1, 1, rows or 1, block_size]`` for the context and ``[trees, 1, 1, rows, rows]`` among the
            trees' rows, float32. They are computed once a step for each window.

        """
        if window not in self._biases:
            context = self.trees.context
            visible = (self.key_position < context[:, None, None])[:, :, None]  # [trees, blocks, 1, block_size]
            among = self.trees.ancestors
            if window > 0:
                oldest = self.query_position - window  # positions up to this one are out of sight
                visible = visible & (self.key_position[None, :, None] > oldest[:, None, :, None])
                among = among & (self.query_position[:, None, :] > oldest[:, :, None])
            self._biases[window] = (_bias(visible)[:, :, None, None], _bias(among)[:, None, None])
        return self._biases[window]

    @cached_property
    def _biases(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        return {}


class TreeCPUAttentionMetadataBuilder(TreeMetadataBuilder, CPUAttentionMetadataBuilder):
    """Splits a step between the native op and the tree pass, request by request."""

    isa: str

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
        if trees is None:
            return super().build(common_prefix_len, common, fast_build)
        is_native = torch.ones(common.num_reqs, dtype=torch.bool)
        is_native[trees.request] = False
        native_common, native_tokens = _select(common, is_native.nonzero().flatten())
        # At least one: a prompt of a single token has no context, yet the scheduler may pad it with drafts.
        num_blocks = max(1, cdiv(int(trees.context.max()), self.block_size))
        return TreeCPUAttentionMetadata(
            trees=trees,
            blocks=common.block_table_tensor[trees.request, :num_blocks].long(),
            block_size=self.block_size,
            native_tokens=native_tokens,
            native=super().build(common_prefix_len, native_common, fast_build) if len(native_tokens) else None,
        )


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """Attention over context and ancestors for rows of branching trees, vLLM's op for all others."""

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
        if attn_metadata.native is not None:
            native_query = query[attn_metadata.native_tokens]
            native_output = torch.empty_like(native_query)
            super().forward(layer, native_query, key, value, kv_cache, attn_metadata.native, native_output)
            output[attn_metadata.native_tokens] = native_output
        token = attn_metadata.trees.token
        attended = self._attend(query[token], key[token], value[token], kv_cache, attn_metadata)
        output[token.flatten()] = attended.flatten(0, 1).to(output.dtype)
        return output

    def _attend(
        self,
        query: torch.Tensor,  # [trees, rows, heads, head_dim]
        key: torch.Tensor,  # [trees, rows, kv_heads, head_dim]
        value: torch.Tensor,  # [trees, rows, kv_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: TreeCPUAttentionMetadata,
    ) -> torch.Tensor:  # [trees, rows, heads, head_dim], float32
        """Softmax over two parts, the context in its blocks and the tree's own rows, without copying them together."""
        trees, rows, _, head_dim = query.shape
        kv_heads, group = self.num_kv_heads, self.num_queries_per_kv
        keys, values = _views(kv_cache)
        context_keys, context_values = keys[metadata.blocks].float(), values[metadata.blocks].float()
        # The query heads of a KV head are stacked on top of each other, so that one product serves the group.
        packed = query.view(trees, rows, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        packed = packed.reshape(trees, kv_heads, group * rows, head_dim).float() * self.scale
        key, value = key.permute(0, 2, 3, 1).float(), value.transpose(1, 2).float()

        context_bias, tree_bias = metadata.biases(self.sliding_window)
        context_scores = packed[:, None] @ context_keys  # [trees, blocks, kv_heads, group * rows, block_size]
        tree_scores = packed @ key  # [trees, kv_heads, group * rows, rows]
        if self.logits_soft_cap:
            context_scores = (context_scores / self.logits_soft_cap).tanh_().mul_(self.logits_soft_cap)
            tree_scores = (tree_scores / self.logits_soft_cap).tanh_().mul_(self.logits_soft_cap)
        by_head = context_scores.unflatten(3, (group, rows))
        by_head += context_bias
        among = tree_scores.unflatten(2, (group, rows))
        among += tree_bias
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes.view(kv_heads, group, 1, 1)
            position = metadata.query_position
            distance = metadata.key_position[None, :, None] - position[:, None, :, None]
            by_head += slopes * distance[:, :, None, None]
            among += slopes * (position[:, None, :] - position[:, :, None])[:, None, None]

        peak = torch.maximum(context_scores.amax(dim=(1, 4)), tree_scores.amax(dim=-1))
        if self.sinks is not None:
            sinks = self.sinks.float().view(kv_heads, group, 1).expand(-1, -1, rows).reshape(kv_heads, -1)
            peak = torch.maximum(peak, sinks)
        context_weights = (context_scores - peak[:, None, :, :, None]).exp_()
        tree_weights = (tree_scores - peak[..., None]).exp_()
        total = context_weights.sum(dim=(1, 4)) + tree_weights.sum(dim=-1)
        if self.sinks is not None:
            total += (sinks - peak).exp_()
        attended = (context_weights @ context_values).sum(dim=1) + tree_weights @ value
        attended /= total[..., None]
        return attended.view(trees, kv_heads, group, rows, head_dim).permute(0, 3, 1, 2, 4).reshape(query.shape)

    def move_kv(
        self,
        layer: torch.nn.Module,
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        source: torch.Tensor,  # [rows], int64, slots
        target: torch.Tensor,  # [rows], int64, slots
    ) -> None:
        """Copy keys and values between slots; the write is the backend's own (see ``TreeAttention.move_kv``)."""
        keys, values = _views(kv_cache)
        block, offset = source // kv_cache.shape[2], source % kv_cache.shape[2]
        self.do_kv_cache_update(layer, keys[block, :, :, offset], values[block, :, offset], kv_cache, target)


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with tree masks; it keeps the name, by which vLLM knows its layouts and limits."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        """Return the implementation."""
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionMetadataBuilder]:
        """Return the metadata builder."""
        return TreeCPUAttentionMetadataBuilder


def _bias(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def _views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View a cache as keys, head_dim before block_size, and values: ``[blocks, kv_heads, block_size, head_dim]``."""
    num_blocks, kv_heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(num_blocks, kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    keys = keys.flatten(2).unflatten(2, (-1, block_size))
    return keys, values


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
        max_query_len=int(lengths.max()) if total else 0,
        query_start_loc=new_start,
        query_start_loc_cpu=new_start,
        seq_lens=common.seq_lens[requests],
        block_table_tensor=common.block_table_tensor[requests],
    )
    return selected, torch.arange(total) + shift
