# SPDX-License-Identifier: Apache-2.0
"""How the tree attention kernel's work is cut, to fit what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from triton import cdiv, next_power_of_2

MIN_DOT = 16
"""The smallest side of a matrix that Triton multiplies."""

WARPGROUP_ROWS = 64
"""From this many rows on, a device with warpgroups multiplies from shared memory, which then holds more per stage."""

WITH_WARPGROUPS = (9, 10, 11)
"""Compute capabilities, without their minor numbers. Other devices multiply from registers."""

MAX_BLOCK_ROWS = 128
MIN_WARPS = 4
MAX_TILE = 64
MAX_SPLITS = 32
WARPS_PER_PROCESSOR = 8
"""The registers of a multiprocessor serve so many warps, each with as many as one may have (255 a thread)."""

TILE_BYTES = 1 << 15
"""Shared memory for one stage of keys and values, and for the queries: three stages leave room for two programs."""

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Gpu:
    """What a launch is fitted to.

    Attributes:
        processors: multiprocessors.
        has_warpgroups: whether it multiplies from shared memory, which leaves registers free.

    """

    processors: int
    has_warpgroups: bool

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """Describe a device; one that is no CUDA device is Triton's interpreter, which runs one program at a time."""
        if device.type != "cuda":
            return cls(processors=1, has_warpgroups=True)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, properties.major in WITH_WARPGROUPS)


@dataclass(frozen=True)
class Tiling:
    """How the kernel's work is cut; sizes are powers of two.

    Attributes:
        block_rows: rows times query heads per KV head that a program attends from.
        tile: slots that it takes in at once.
        splits: into how many stretches a request's slots are cut.
        warps: per program.
        stages: of the pipeline that loads block numbers, then keys and values, then works on them.

    """

    block_rows: int
    tile: int
    splits: int
    warps: int
    stages: int

    def num_blocks(self, num_tokens: int, num_reqs: int, group: int) -> int:
        """Bound the blocks of rows of that many tokens, however they fall to the requests."""
        return num_tokens // (self.block_rows // group) + num_reqs


@lru_cache
def choose_tiling(
    num_tokens: int,
    num_reqs: int,
    max_rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    query_bytes: int,
    cache_bytes: int,
    gpu: Gpu,
    *,
    own_rows_only: bool,
    bends_scores: bool,
) -> Tiling:
    """Choose the tiling for a step's shape, which is all that it depends on: a CUDA graph may hold the launch.

    Slots are split into as many stretches as the device works on at once, in one wave.

    Args:
        num_tokens: the step's, padding included.
        num_reqs: ``AttentionStep.least_reqs``: more of them have the less to do each.
        max_rows: of one request.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: numbers per head.
        query_bytes: per number, as they are multiplied.
        cache_bytes: per number.
        gpu: what the kernel runs on.
        own_rows_only: the contexts are attended to elsewhere; few slots are left.
        bends_scores: the layer has a window or a soft cap, which take registers.

    """
    group, row_bytes = heads // kv_heads, next_power_of_2(head_dim) * query_bytes
    # Without tensor cores, products of float32 have to fit into registers.
    most_rows = MIN_DOT if query_bytes == FLOAT32_BYTES else min(MAX_BLOCK_ROWS, TILE_BYTES // row_bytes)
    block_rows = max(min(next_power_of_2(max_rows * group), most_rows), next_power_of_2(group), MIN_DOT)
    block_queries = block_rows // group
    blocks = min(num_tokens // block_queries + num_reqs, num_reqs * cdiv(max_rows, block_queries))
    tile = TILE_BYTES // (2 * next_power_of_2(head_dim) * cache_bytes)
    is_crowded = block_rows >= WARPGROUP_ROWS and (bends_scores or not gpu.has_warpgroups)
    warps = 2 * MIN_WARPS if block_rows * row_bytes > TILE_BYTES // 2 else MIN_WARPS
    at_once = gpu.processors * WARPS_PER_PROCESSOR // warps
    return Tiling(
        block_rows=block_rows,
        tile=min(max(tile, MIN_DOT), MAX_TILE // 2 if is_crowded else MAX_TILE),
        splits=1 if own_rows_only else min(max(at_once // (blocks * kv_heads), 1), MAX_SPLITS),
        warps=warps,
        stages=5 if block_rows < WARPGROUP_ROWS else 3,
    )
