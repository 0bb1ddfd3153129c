# SPDX-License-Identifier: Apache-2.0
"""Tree attention over the paged KV cache as Triton kernels; ``ops`` launches them.

The algorithm is FlashAttention-2's online softmax with Flash-Decoding's split of the keys. A program attends from some
rows of one request, with all query heads that share a KV head, to one stretch of the request's slots; where slots are
split, a second kernel merges the stretches. Scores are in log2 units, so that ``exp2`` serves. Where another kernel has
attended to the contexts already, what is left are a request's own rows, and its result is merged in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_medusa.step.trees import WORD_BITS

LOG2_E = tl.constexpr(1.4426950408889634)
BITS = tl.constexpr(WORD_BITS)
NEVER = tl.constexpr(float("-inf"))

LEFT_EDGE = tl.constexpr(0)
OPEN = tl.constexpr(1)
RIGHT_EDGE = tl.constexpr(2)
"""Parts of a row's keys: those around the window's start, those that every row sees, and those around the rows' own."""


@triton.jit(do_not_specialize=["num_reqs", "splits"])
def attend_kernel(
    query_ptr: tl.tensor,  # [num_tokens, heads, head_dim]
    key_cache_ptr: tl.tensor,  # [blocks, block_size, kv_heads, head_dim]
    value_cache_ptr: tl.tensor,  # [blocks, block_size, kv_heads, head_dim]
    output_ptr: tl.tensor,  # [num_tokens, heads, head_dim]; holds attention to the contexts if context_lse_ptr is given
    context_lse_ptr: tl.tensor,  # [heads, num_tokens], float32: its natural log-sum-exp, or None
    partial_ptr: tl.tensor,  # [num_tokens, heads, splits, head_dim]
    log_total_ptr: tl.tensor,  # [num_tokens, heads, splits], float32: log2 of each stretch's sum of exponentials
    query_start_loc_ptr: tl.tensor,  # [num_reqs + 1]
    seq_lens_ptr: tl.tensor,  # [num_reqs]
    block_table_ptr: tl.tensor,  # [num_reqs, blocks]
    ancestor_bits_ptr: tl.tensor,  # [num_tokens, words], int64
    depths_ptr: tl.tensor,  # [num_tokens]
    sinks_ptr: tl.tensor,  # [heads], or None
    query_scale_ptr: tl.tensor,  # [kv_heads], or None
    key_scale_ptr: tl.tensor,  # [kv_heads], or None
    value_scale_ptr: tl.tensor,  # [kv_heads], or None
    scale: tl.tensor,
    soft_cap: tl.tensor,
    num_reqs: tl.tensor,
    splits: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_head_stride: tl.tensor,
    output_token_stride: tl.tensor,
    output_head_stride: tl.tensor,
    context_lse_stride: tl.tensor,
    block_table_stride: tl.tensor,
    query_scale_stride: tl.tensor,
    key_scale_stride: tl.tensor,
    value_scale_stride: tl.tensor,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    group: tl.constexpr,
    block_size: tl.constexpr,
    words: tl.constexpr,
    window: tl.constexpr,
    capped: tl.constexpr,
    is_split: tl.constexpr,
    block_rows: tl.constexpr,
    tile: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Attend from ``block_rows // group`` rows of one request to one stretch of its slots; see ``tree_attention``."""
    block_queries: tl.constexpr = block_rows // group
    block_index = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    # Find the program's request and rows.
    request = _request_of(block_index, query_start_loc_ptr, num_reqs, block_queries)
    start = tl.load(query_start_loc_ptr + request)
    rows = tl.load(query_start_loc_ptr + request + 1) - start
    first_row = (block_index - start // block_queries - request) * block_queries
    if first_row >= rows:
        return

    # Load the queries: of each row all heads that share the KV head, one after another.
    place = tl.arange(0, block_rows)
    row = first_row + place // group
    head = kv_head * group + place % group
    is_row = (place // group < block_queries) & (row < rows)
    token = (start + row).to(tl.int64)
    dim = tl.arange(0, padded_dim)
    is_dim = dim < head_dim
    is_number = is_row[:, None] & is_dim[None, :]
    query_at = (token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :]
    query = tl.load(query_ptr + query_at, mask=is_number, other=0.0).to(output_ptr.dtype.element_ty)

    # Bound the keys by what the rows may see.
    context = tl.load(seq_lens_ptr + request) - rows
    ancestor_bits = ancestor_bits_ptr + start.to(tl.int64) * words
    depth = depths_ptr + start
    is_tree = tl.load(ancestor_bits) >= 0
    row_depth = tl.where(is_tree, tl.load(depth + row, mask=is_row, other=0), row)

    # Some row sees keys first_key to end_key - 1; every row sees those of them from every_first to every_end - 1.
    # Tiles are counted from slot `origin` on.
    origin = 0
    end_key = context + tl.minimum(first_row + block_queries, rows)
    every_end = context + 1 + tl.where(is_tree, 0, first_row)
    first_key = 0
    every_first = 0
    if context_lse_ptr is not None:
        origin = context
        first_key = context
        every_first = context
        every_end = context
    elif window > 0:
        lowest = tl.min(tl.where(is_row, row_depth, rows), axis=0)
        highest = tl.max(tl.where(is_row, row_depth, 0), axis=0)
        first_key = tl.maximum(context + lowest - window + 1, 0)
        every_first = tl.maximum(context + highest - window + 1, 0)

    # Of its stretch's tiles, the program takes those from first_open to end_open - 1 without a mask.
    tiles_before = (first_key - origin) // tile
    tiles = tl.cdiv(end_key - origin, tile)
    stretch = tl.cdiv(tiles - tiles_before, splits)
    first_tile = tiles_before + split * stretch
    end_tile = tl.maximum(tl.minimum(first_tile + stretch, tiles), first_tile)
    first_open = tl.minimum(tl.maximum(tl.cdiv(every_first - origin, tile), first_tile), end_tile)
    end_open = tl.minimum(tl.maximum((every_end - origin) // tile, first_open), end_tile)

    # Start the online softmax, in the first stretch with the sink: a key of that score and of value zero.
    maximum = tl.full([block_rows], NEVER, tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    accumulated = tl.zeros([block_rows, padded_dim], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        maximum = tl.where(split == 0, sink, maximum)
        total = tl.where(split == 0, 1.0, total)
    score_scale = scale
    if query_scale_ptr is not None:
        score_scale = score_scale * tl.load(query_scale_ptr + kv_head * query_scale_stride)
    if key_scale_ptr is not None:
        score_scale = score_scale * tl.load(key_scale_ptr + kv_head * key_scale_stride)
    if not capped:
        score_scale = score_scale * LOG2_E
    key_cache = key_cache_ptr + kv_head.to(tl.int64) * key_head_stride + dim[None, :]
    value_cache = value_cache_ptr + kv_head.to(tl.int64) * value_head_stride + dim[None, :]
    block_table = block_table_ptr + request.to(tl.int64) * block_table_stride

    # Take in the stretch, tile by tile: without a mask where every row sees every key, with one at both edges.
    behind_context: tl.constexpr = context_lse_ptr is not None
    first_part: tl.constexpr = RIGHT_EDGE if behind_context else LEFT_EDGE if window > 0 else OPEN
    for part in tl.static_range(first_part, RIGHT_EDGE + 1):
        if part == LEFT_EDGE:
            part_first, part_end = first_tile, first_open
        elif part == OPEN:
            part_first, part_end = first_open, end_open
        else:
            part_first, part_end = end_open, end_tile
        for index in tl.range(part_first, part_end, num_stages=stages if part == OPEN else 1):
            # Load the tile's keys and values through the block table.
            slot = origin + index * tile + tl.arange(0, tile)
            offset = slot - context
            slot_at = slot % block_size
            if part != OPEN:
                in_use = (slot >= first_key) & (slot < end_key)  # Others may hold NaN, which no zero weight removes.
                block = tl.load(block_table + slot // block_size, mask=in_use, other=0).to(tl.int64)
            else:
                block = tl.load(block_table + slot // block_size).to(tl.int64)
            keys = key_cache + (block * key_block_stride + slot_at * key_slot_stride)[:, None]
            values = value_cache + (block * value_block_stride + slot_at * value_slot_stride)[:, None]
            if part != OPEN:
                key = tl.load(keys, mask=in_use[:, None] & is_dim[None, :], other=0.0)
                value = tl.load(values, mask=in_use[:, None] & is_dim[None, :], other=0.0)
            elif head_dim != padded_dim:
                key = tl.load(keys, mask=is_dim[None, :], other=0.0)
                value = tl.load(values, mask=is_dim[None, :], other=0.0)
            else:
                key = tl.load(keys)
                value = tl.load(values)

            # Score the keys.
            score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * score_scale
            if capped:
                # tanh(y) = 1 - 2 / (exp(2 y) + 1) saturates where a quotient of exponentials would overflow.
                score = soft_cap * (1 - 2 / (tl.exp2(score * (2 * LOG2_E / soft_cap)) + 1)) * LOG2_E
            if part != OPEN:
                seen = _visible(offset, row, row_depth, is_row, is_tree, ancestor_bits, depth, window, words)
                score = tl.where(seen, score, NEVER)
            # Fold the tile into the running maximum, sum and output.
            new_maximum = tl.maximum(maximum, tl.max(score, axis=1))
            shift = tl.where(new_maximum == NEVER, 0.0, new_maximum)
            weight = tl.exp2(score - shift[:, None])
            shrink = tl.exp2(maximum - shift)
            total = total * shrink + tl.sum(weight, axis=1)
            accumulated = accumulated * shrink[:, None]
            accumulated = tl.dot(weight.to(query.dtype), value.to(query.dtype), accumulated, input_precision="ieee")
            maximum = new_maximum

    # Write the output, or what the merge needs of this stretch.
    output = accumulated / tl.where(total > 0, total, 1.0)[:, None]
    log_total = maximum + tl.log2(total)
    if value_scale_ptr is not None:
        output = output * tl.load(value_scale_ptr + kv_head * value_scale_stride)
    if is_split:
        partial = (token * (tl.num_programs(1) * group) + head) * splits + split
        tl.store(log_total_ptr + partial, log_total, mask=is_row)
        partial_at = partial[:, None] * head_dim + dim[None, :]
        tl.store(partial_ptr + partial_at, output.to(partial_ptr.dtype.element_ty), mask=is_number)
    else:
        output_at = (token * output_token_stride + head * output_head_stride)[:, None] + dim[None, :]
        if context_lse_ptr is not None:
            # Nothing is read of an empty context: kernels differ in what they write there.
            has_context = is_row & (row < tl.where(context > 0, rows, 0))
            context_lse = tl.load(context_lse_ptr + head * context_lse_stride + token, mask=has_context, other=NEVER)
            context_output = tl.load(output_ptr + output_at, mask=is_number & has_context[:, None], other=0.0)
            share = 1 / (1 + tl.exp2(log_total - context_lse * LOG2_E))[:, None]
            output = output + share * (context_output.to(tl.float32) - output)
        tl.store(output_ptr + output_at, output.to(output_ptr.dtype.element_ty), mask=is_number)


@triton.jit
def _request_of(
    block: tl.tensor,
    query_start_loc_ptr: tl.tensor,  # [num_reqs + 1]
    num_reqs: tl.tensor,
    block_queries: tl.constexpr,
) -> tl.tensor:
    """Find the request to which a block of rows belongs, by halving.

    Request i's blocks begin at ``query_start_loc[i] // block_queries + i``, so the grid needs no sizes from the device.
    """
    request = 0
    end = num_reqs
    while end - request > 1:
        middle = (request + end) // 2
        is_behind = tl.load(query_start_loc_ptr + middle) // block_queries + middle > block
        end = tl.where(is_behind, middle, end)
        request = tl.where(is_behind, request, middle)
    return request


@triton.jit
def _visible(
    offset: tl.tensor,  # [tile]: slot - context; from 0 on these are the request's rows
    row: tl.tensor,  # [block_rows]
    row_depth: tl.tensor,  # [block_rows]
    is_row: tl.tensor,  # [block_rows]
    is_tree: tl.tensor,
    ancestor_bits: tl.tensor,  # [rows, words], int64
    depth: tl.tensor,  # [rows]
    window: tl.constexpr,
    words: tl.constexpr,
) -> tl.tensor:  # [block_rows, tile]
    """Whether each row of a request sees each key."""
    seen = offset[None, :] <= row[:, None]
    key_depth = offset
    if is_tree:
        seen = seen & (offset < 0)[None, :]
        for word in tl.static_range(words):
            bits = tl.load(ancestor_bits + row * words + word, mask=is_row, other=0)
            bit = offset - word * BITS
            in_word = (bit >= 0) & (bit < BITS)
            low, high = bits.to(tl.int32)[:, None], (bits >> 32).to(tl.int32)[:, None]
            shifted = tl.where((bit < 32)[None, :], low, high) >> (bit & 31)[None, :]
            seen = seen | (in_word[None, :] & ((shifted & 1) != 0))
        if window > 0:
            is_key = (offset >= 0) & (offset <= tl.max(tl.where(is_row, row, 0), axis=0))
            key_depth = tl.where(is_key, tl.load(depth + offset, mask=is_key, other=0), offset)
    if window > 0:
        seen = seen & (row_depth[:, None] - key_depth[None, :] < window)
    return seen


@triton.jit(do_not_specialize=["num_reqs", "splits"])
def merge_kernel(
    partial_ptr: tl.tensor,  # [num_tokens, heads, splits, head_dim]
    log_total_ptr: tl.tensor,  # [num_tokens, heads, splits], float32
    output_ptr: tl.tensor,  # [num_tokens, heads, head_dim]
    query_start_loc_ptr: tl.tensor,  # [num_reqs + 1]
    num_reqs: tl.tensor,
    splits: tl.tensor,
    output_token_stride: tl.tensor,
    output_head_stride: tl.tensor,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    padded_splits: tl.constexpr,
) -> None:
    """Average one token's stretches of one head, each weighted by its sum of exponentials."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + num_reqs):
        return
    split = tl.arange(0, padded_splits)
    dim = tl.arange(0, padded_dim)
    partial = (token.to(tl.int64) * tl.num_programs(1) + head) * splits + split
    log_total = tl.load(log_total_ptr + partial, mask=split < splits, other=NEVER)
    weight = tl.exp2(log_total - tl.max(log_total, axis=0))
    is_number = (split < splits)[:, None] & (dim < head_dim)[None, :]
    outputs = tl.load(partial_ptr + partial[:, None] * head_dim + dim[None, :], mask=is_number, other=0.0)
    output = tl.sum(outputs.to(tl.float32) * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    output_at = token.to(tl.int64) * output_token_stride + head * output_head_stride + dim
    tl.store(output_ptr + output_at, output.to(output_ptr.dtype.element_ty), mask=dim < head_dim)
