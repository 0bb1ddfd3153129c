# SPDX-License-Identifier: Apache-2.0
"""Tree attention for CPUs: vLLM's ``CPU_ATTN``, with a masked pass over the paged cache for rows of branching trees."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_medusa.attention.metadata import TreeBackendMixin, TreeMetadataBuilder
from vllm_medusa.compat.backends import overridden
from vllm_medusa.step.trees import WORD_BITS, StepTrees

READABLE_ISAS = ("vec", "vec16")
"""Instruction sets whose cache layout we read: keys ``[head_dim, block_size]`` in each block, values ``[block_size,
head_dim]``. The others pack keys in tiles of their own."""


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
    """What a step with branching trees needs; all other requests are causal and go to vLLM's own op.

    Trees of fewer rows than the largest are padded at the end with their last row, so padding's output is that row's. A
    tree's keys are those of its context and of its rows, in the order of their slots; trees of fewer keys than the
    largest repeat their first one, unseen.

    Attributes:
        context: ``[trees]``, int64: tokens before the root, all in the KV cache, all visible to every row.
        token_indices: ``[trees, rows]``, int64: each row's index among the step's tokens.
        depth: ``[trees, rows]``, int64: the row's position is ``context + depth``.
        ancestors: ``[trees, rows, rows]``, bool: row i may attend to row j.
        block: ``[trees, keys]``, int64: the cache block of each key.
        offset: ``[trees, keys]``, int64: its place in the block.
        native: all other requests; None if there are none.
        in_order: whether the trees' rows are the step's tokens, all of them and one after another.

    """

    context: torch.Tensor
    token_indices: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    block: torch.Tensor
    offset: torch.Tensor
    native: NativeTokens | None
    in_order: bool

    @cached_property
    def distance(self) -> torch.Tensor:
        """``[trees, rows, keys]``, int64: each key's position less the row's own; never positive for a visible key."""
        own = self.context[:, None] + self.depth
        row, is_row = self._row
        return torch.where(is_row, own.gather(1, row), self._slot)[:, None] - own[:, :, None]

    def bias(self, window: int) -> torch.Tensor:
        """Return what is added to the scores for a sliding window of that many positions (-1: none).

        Returns:
            ``[trees, 1, rows, keys]``, float32, 0 or -inf; computed once a step for each window.

        """
        if window not in self._biases:
            row, is_row = self._row
            visible = self.ancestors.gather(2, row[:, None].expand(-1, self.ancestors.shape[1], -1)) & is_row[:, None]
            visible |= (self._slot < self.context[:, None])[:, None]
            if window > 0:
                visible &= self.distance > -window
            self._biases[window] = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[:, None]
        return self._biases[window]

    def value_rows(self, kv_heads: int, block_size: int) -> torch.Tensor:
        """``[trees, kv_heads, keys]``, int64: which row of ``head_dim`` numbers each value is."""
        shape = (kv_heads, block_size)
        if shape not in self._value_rows:
            region = self.block[:, None] * kv_heads + torch.arange(kv_heads)[:, None]
            self._value_rows[shape] = (region * 2 + 1) * block_size + self.offset[:, None]
        return self._value_rows[shape]

    @cached_property
    def _value_rows(self) -> dict[tuple[int, int], torch.Tensor]:
        return {}

    @cached_property
    def _slot(self) -> torch.Tensor:
        """``[keys]``, int64: the place of each key among its request's slots."""
        return torch.arange(self.block.shape[1])

    @cached_property
    def _row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[trees, keys]`` twice: which of the tree's rows a key is, and whether it is one at all."""
        rows = self.depth.shape[1]
        row = self._slot - self.context[:, None]
        return row.clamp(0, rows - 1), (row >= 0) & (row < rows)

    @cached_property
    def _biases(self) -> dict[int, torch.Tensor]:
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
        if trees is None or not len(requests := trees.branching_reqs()):
            return super().build(common_prefix_len, common, fast_build)
        native = None
        if len(requests) < common.num_reqs:
            is_native = torch.ones(common.num_reqs, dtype=torch.bool)
            is_native[requests] = False
            native_common, native_tokens = _select(common, is_native.nonzero().flatten())
            native = NativeTokens(native_tokens, super().build(common_prefix_len, native_common, fast_build))
        token_indices, ancestors = side_by_side(trees, requests)
        num_keys = common.seq_lens[requests].long()
        slot = torch.arange(int(num_keys.max())).expand(len(num_keys), -1)
        slot = slot * (slot < num_keys[:, None])
        return TreeCPUAttentionMetadata(
            context=num_keys - trees.cu_num_rows.diff()[requests],
            token_indices=token_indices,
            depth=trees.depths[token_indices],
            ancestors=ancestors,
            block=common.block_table_tensor[requests].long().gather(1, slot // self.block_size),
            offset=slot % self.block_size,
            native=native,
            in_order=native is None and token_indices.numel() == common.num_actual_tokens,
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
        if (native := attn_metadata.native) is not None:
            native_query = query[native.token_indices]
            native_output = torch.empty_like(native_query)
            super().forward(layer, native_query, key, value, kv_cache, native.metadata, native_output)
            output[native.token_indices] = native_output
        token_indices = attn_metadata.token_indices
        if attn_metadata.in_order:
            num_rows, shape = token_indices.numel(), token_indices.shape
            tree_query, tree_output = (each[:num_rows].unflatten(0, shape) for each in (query, output))
            tree_output.copy_(self._attend(tree_query, kv_cache, attn_metadata))
        else:
            attended = self._attend(query[token_indices], kv_cache, attn_metadata)
            output[token_indices.flatten()] = attended.flatten(0, 1).to(output.dtype)
        return output

    def _attend(
        self,
        query: torch.Tensor,  # [trees, rows, heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: TreeCPUAttentionMetadata,
    ) -> torch.Tensor:  # [trees, rows, heads, head_dim], float32
        """Attend to what the cache holds, the trees' own rows included: vLLM has written them before."""
        key, value = (each.float() for each in _gather(kv_cache, metadata))
        bias = metadata.bias(self.sliding_window)
        if self.alibi_slopes is not None:
            bias = bias + self.alibi_slopes[:, None, None] * metadata.distance[:, None]
        if self.sinks is not None:
            key, value, bias = self._with_sinks(key, value, bias)
        query = query.transpose(1, 2).float()
        if not self.logits_soft_cap:
            attended = scaled_dot_product_attention(query, key, value, bias, scale=self.scale, enable_gqa=True)
        else:
            key, value = (each.repeat_interleave(self.num_queries_per_kv, dim=1) for each in (key, value))
            scores = (query @ key.mT).mul_(self.scale / self.logits_soft_cap).tanh_().mul_(self.logits_soft_cap)
            attended = (scores + bias).softmax(dim=-1) @ value
        return attended.transpose(1, 2)

    def _with_sinks(
        self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append each head's sink: a key whose score is the sink whatever the query, and whose value is zero."""
        assert self.sinks is not None
        trees, _, rows, _ = bias.shape
        sinks = self.sinks.float()[:, None, None].expand(trees, -1, rows, 1)
        bias = torch.cat([bias.expand(-1, sinks.shape[1], -1, -1), sinks], dim=-1)
        return pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1)), bias

    def move_kv(
        self,
        layer: torch.nn.Module,
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        source: torch.Tensor,  # [rows], int64, slots
        destination: torch.Tensor,  # [rows], int64, slots
    ) -> None:
        """Copy keys and values between slots; the write is the backend's own (see ``TreeAttention.move_kv``)."""
        keys, values = _views(kv_cache)
        block, offset = source // kv_cache.shape[2], source % kv_cache.shape[2]
        self.do_kv_cache_update(layer, keys[block, :, :, offset], values[block, :, offset], kv_cache, destination)


class TreeCPUAttentionBackend(TreeBackendMixin, CPUAttentionBackend):
    """``CPU_ATTN`` with tree masks."""

    tree_impl, tree_builder = TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder


def _views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View a cache as keys, head_dim before block_size, and values: ``[blocks, kv_heads, block_size, head_dim]``."""
    num_blocks, kv_heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(num_blocks, kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    keys = keys.flatten(2).unflatten(2, (-1, block_size))
    return keys, values


def _gather(kv_cache: torch.Tensor, metadata: TreeCPUAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a step's keys and values out of a cache, ``[trees, kv_heads, keys, head_dim]`` each."""
    _, kv_heads, block_size, _ = kv_cache.shape
    keys, values = _views(kv_cache)
    key = keys.mT[metadata.block[:, None], torch.arange(kv_heads)[:, None], metadata.offset[:, None]]
    # Values are rows of memory, and several times faster to gather as such.
    return key, embedding(metadata.value_rows(kv_heads, block_size), kv_cache.view(-1, values.shape[-1]))


def side_by_side(
    trees: StepTrees,
    requests: torch.Tensor,  # [trees], int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``token_indices`` and ``ancestors`` of some requests' trees (see ``TreeCPUAttentionMetadata``)."""
    root, lengths = trees.roots[requests], trees.cu_num_rows.diff()[requests]
    place = torch.arange(int(lengths.max()))
    token_indices = trees.logits_indices[root[:, None] + place.minimum(lengths[:, None] - 1)]
    bits = trees.ancestor_bits[token_indices][..., None] >> torch.arange(WORD_BITS) & 1
    ancestors = bits.flatten(2)[..., : len(place)].bool()
    return token_indices, ancestors & (place < lengths[:, None])[:, None]


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
