# SPDX-License-Identifier: Apache-2.0
"""The KV commit for GPUs: one launch moves a step's accepted rows in all layers that share a cache layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.kv_cache.backend_commit import cache_owners
from vllm_medusa.step.trees import StepTrees

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8}
"""The types that bytes may be moved as, widest first."""


class KernelCommit:
    """Moves rows as bytes, in one launch a KV cache group where its layers' caches look alike."""

    def __init__(self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any]) -> None:
        self._tables = [
            CacheTable.group([layer.kv_cache.transpose(1, 2) for layer in owners])
            for owners in cache_owners(kv_cache_config, layers)
        ]

    def __call__(
        self,
        trees: StepTrees,
        accepted: Walk,
        slots: Sequence[torch.Tensor],  # by KV cache group: [num_tokens], int64
    ) -> None:
        """Commit one step's walk (see ``KVCommit``)."""
        for tables, slot in zip(self._tables, slots, strict=True):
            for table in tables:
                move_accepted(table, trees, accepted, slot)


@dataclass(frozen=True, eq=False)
class CacheTable:
    """Layers' caches of one shape and layout, so that one launch reaches them all.

    It holds no memory of theirs: vLLM makes a small cache to profile CUDA graphs, and frees it before the real one.

    Attributes:
        addresses: ``[caches]``, int64, on the caches' device. A layout that has keys and values apart makes two caches
            of a layer.
        layout: ``[blocks, block_size, kv_heads, words]``, on the meta device: each cache's sizes and strides, viewed as
            integers: what a head keeps for a slot, scales included.

    """

    addresses: torch.Tensor
    layout: torch.Tensor

    @classmethod
    def group(cls, caches: Sequence[torch.Tensor]) -> list[CacheTable]:
        """Return as few tables as the caches' layouts allow; a cache that several layers share is taken once.

        Args:
            caches: ``[blocks, block_size, kv_heads, content]`` each, of any dtype and strides but the last, which is 1.

        """
        groups: dict[tuple[torch.Size, tuple[int, ...], torch.dtype], set[int]] = {}
        for cache in map(_as_words, caches):
            groups.setdefault((cache.shape, cache.stride(), cache.dtype), set()).add(cache.data_ptr())
        return [
            cls(
                addresses=torch.tensor(sorted(addresses), dtype=torch.int64, device=caches[0].device),
                layout=torch.empty_strided(shape, stride, dtype=dtype, device="meta"),
            )
            for (shape, stride, dtype), addresses in groups.items()
        ]


def move_accepted(
    table: CacheTable,
    trees: StepTrees,
    accepted: Walk,
    slots: torch.Tensor,  # [num_tokens], int
) -> None:
    """Move each request's accepted rows behind its root, in place; nothing waits for the device.

    Args:
        table: the caches.
        trees: the step's trees.
        accepted: the walk.
        slots: where each of the step's tokens was written.

    """
    (num_reqs, levels), layout = accepted.rows.shape, table.layout
    _, block_size, kv_heads, words = layout.shape
    _move_kernel[(num_reqs, len(table.addresses), kv_heads)](
        table.addresses,
        accepted.rows,
        trees.cu_num_rows,
        trees.logits_indices,
        slots,
        levels,
        accepted.rows.stride(0),
        *layout.stride()[:3],
        block_size=block_size,
        words=words,
        padded_words=triton.next_power_of_2(words),
        word_type=WORDS[layout.dtype],
        num_warps=1,
    )


@triton.jit(do_not_specialize=["levels", "rows_stride"])
def _move_kernel(
    addresses_ptr: tl.tensor,  # [caches]
    rows_ptr: tl.tensor,  # [num_reqs, levels]
    cu_num_rows_ptr: tl.tensor,  # [num_reqs + 1]
    logits_indices_ptr: tl.tensor,  # [num_rows]
    slots_ptr: tl.tensor,  # [num_tokens]
    levels: tl.tensor,
    rows_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    block_size: tl.constexpr,
    words: tl.constexpr,
    padded_words: tl.constexpr,
    word_type: tl.constexpr,
) -> None:
    """Move one request's rows in one head of one cache.

    Along a path rows grow by at least one a level, so a level's row never lies before its destination. No destination
    is a later level's source, then: going level by level overwrites nothing that is still to be read.
    """
    request = tl.program_id(0)
    address = tl.load(addresses_ptr + tl.program_id(1))
    word = tl.arange(0, padded_words)
    head = address.to(tl.pointer_type(word_type)) + tl.program_id(2).to(tl.int64) * head_stride + word
    root = tl.load(cu_num_rows_ptr + request)
    for level in tl.range(1, levels):
        row = tl.load(rows_ptr + request * rows_stride + level)
        if (row >= 0) & (row != root + level):
            source = tl.load(slots_ptr + tl.load(logits_indices_ptr + row)).to(tl.int64)
            destination = tl.load(slots_ptr + tl.load(logits_indices_ptr + root + level)).to(tl.int64)
            source_at = source // block_size * block_stride + source % block_size * slot_stride
            destination_at = destination // block_size * block_stride + destination % block_size * slot_stride
            tl.store(head + destination_at, tl.load(head + source_at, mask=word < words), mask=word < words)


def _as_words(cache: torch.Tensor) -> torch.Tensor:
    """View a cache as the widest integers that its sizes, strides and address allow."""
    size = cache.element_size()
    numbers = (cache.data_ptr(), *(each * size for each in (cache.shape[-1], *cache.stride()[:-1])))
    return cache.view(next(dtype for dtype in WORDS if all(number % dtype.itemsize == 0 for number in numbers)))
