# SPDX-License-Identifier: Apache-2.0
"""Attention for trees by torch calls: keys and values are gathered from the paged cache, then masked and attended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_medusa.attention.cpu.cache import views
from vllm_medusa.step.trees import WORD_BITS, StepTrees


@dataclass(frozen=True, eq=False)
class PaddedTrees:
    """Branching trees side by side (a ``TreePass``); all other requests are causal and go to vLLM's own op.

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
        in_order: whether the trees' rows are the step's tokens, all of them and one after another.

    """

    context: torch.Tensor
    token_indices: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    block: torch.Tensor
    offset: torch.Tensor
    in_order: bool

    @classmethod
    def takes(cls, trees: StepTrees, common: CommonAttentionMetadata) -> torch.Tensor:
        """Return the requests whose trees branch, ``[trees]``, int64 (see ``TreePass``)."""
        return trees.branching_reqs()

    @classmethod
    def of(
        cls,
        trees: StepTrees,
        common: CommonAttentionMetadata,
        requests: torch.Tensor,  # [trees], int64
        block_size: int,
    ) -> Self:
        """Prepare the trees of these requests."""
        token_indices, ancestors = side_by_side(trees, requests)
        num_keys = common.seq_lens[requests].long()
        slot = torch.arange(int(num_keys.max())).expand(len(num_keys), -1)
        slot = slot * (slot < num_keys[:, None])
        return cls(
            context=num_keys - trees.cu_num_rows.diff()[requests],
            token_indices=token_indices,
            depth=trees.depths[token_indices],
            ancestors=ancestors,
            block=common.block_table_tensor[requests].long().gather(1, slot // block_size),
            offset=slot % block_size,
            in_order=len(requests) == common.num_reqs and token_indices.numel() == common.num_actual_tokens,
        )

    def attend(
        self,
        layer: CPUAttentionBackendImpl,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        output: torch.Tensor,  # [tokens, heads, head_dim]
    ) -> None:
        """Write the output of the trees' rows."""
        token_indices = self.token_indices
        if self.in_order:
            num_rows, shape = token_indices.numel(), token_indices.shape
            tree_query, tree_output = (each[:num_rows].unflatten(0, shape) for each in (query, output))
            tree_output.copy_(self._attend(layer, tree_query, kv_cache))
        else:
            attended = self._attend(layer, query[token_indices], kv_cache)
            output[token_indices.flatten()] = attended.flatten(0, 1).to(output.dtype)

    def _attend(
        self,
        layer: CPUAttentionBackendImpl,
        query: torch.Tensor,  # [trees, rows, heads, head_dim]
        kv_cache: torch.Tensor,
    ) -> torch.Tensor:  # [trees, rows, heads, head_dim], float32
        key, value = (each.float() for each in self._gather(kv_cache))
        bias = self.bias(layer.sliding_window)
        if layer.alibi_slopes is not None:
            bias = bias + layer.alibi_slopes[:, None, None] * self.distance[:, None]
        if layer.sinks is not None:
            key, value, bias = _with_sinks(layer.sinks, key, value, bias)
        query = query.transpose(1, 2).float()
        if not layer.logits_soft_cap:
            attended = scaled_dot_product_attention(query, key, value, bias, scale=layer.scale, enable_gqa=True)
        else:
            key, value = (each.repeat_interleave(layer.num_queries_per_kv, dim=1) for each in (key, value))
            scores = (query @ key.mT).mul_(layer.scale / layer.logits_soft_cap).tanh_().mul_(layer.logits_soft_cap)
            attended = (scores + bias).softmax(dim=-1) @ value
        return attended.transpose(1, 2)

    def _gather(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the trees' keys and values out of a cache, ``[trees, kv_heads, keys, head_dim]`` each."""
        _, kv_heads, block_size, _ = kv_cache.shape
        keys, values = views(kv_cache)
        key = keys.mT[self.block[:, None], torch.arange(kv_heads)[:, None], self.offset[:, None]]
        # Values are rows of memory, and several times faster to gather as such.
        return key, embedding(self.value_rows(kv_heads, block_size), kv_cache.view(-1, values.shape[-1]))

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


def side_by_side(
    trees: StepTrees,
    requests: torch.Tensor,  # [trees], int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``token_indices`` and ``ancestors`` of some requests' trees (see ``PaddedTrees``)."""
    root, lengths = trees.roots[requests], trees.cu_num_rows.diff()[requests]
    place = torch.arange(int(lengths.max()))
    token_indices = trees.logits_indices[root[:, None] + place.minimum(lengths[:, None] - 1)]
    bits = trees.ancestor_bits[token_indices][..., None] >> torch.arange(WORD_BITS) & 1
    ancestors = bits.flatten(2)[..., : len(place)].bool()
    return token_indices, ancestors & (place < lengths[:, None])[:, None]


def _with_sinks(
    sinks: torch.Tensor,  # [heads]
    key: torch.Tensor,  # [trees, kv_heads, keys, head_dim]
    value: torch.Tensor,  # [trees, kv_heads, keys, head_dim]
    bias: torch.Tensor,  # [trees, 1 or heads, rows, keys]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append each head's sink: a key whose score is the sink whatever the query, and whose value is zero."""
    trees, _, rows, _ = bias.shape
    sinks = sinks.float()[:, None, None].expand(trees, -1, rows, 1)
    bias = torch.cat([bias.expand(-1, sinks.shape[1], -1, -1), sinks], dim=-1)
    return pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1)), bias
