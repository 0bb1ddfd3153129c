# SPDX-License-Identifier: Apache-2.0
"""A step's trees for GPUs: one launch derives them from the drafts' parents and lengths, which stay on the device."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from vllm_medusa.step.trees import CAUSAL, WORD_BITS, StepTrees

BITS = tl.constexpr(WORD_BITS)
CAUSAL_WORD = tl.constexpr(CAUSAL)


def derive_trees_on_device(
    parents: torch.Tensor,  # [max_num_reqs, num_nodes], int64
    idx_mapping: torch.Tensor,  # [num_reqs], int64
    query_start_loc: torch.Tensor,  # [num_reqs + 1], int32
    cu_num_rows: torch.Tensor,  # [num_reqs + 1], int32
    logits_indices: torch.Tensor,  # [num_rows], int64
    input_ids: torch.Tensor,  # [num_tokens], int
    positions: torch.Tensor,  # [num_tokens], int64
    max_depth: int,
    num_drafting_reqs: int,
    buffers: StepTrees,
) -> StepTrees:
    """Do what ``derive_trees`` does, without waiting for the device.

    Args:
        parents: ``Drafts.parents``, by state index.
        idx_mapping: each request's state index, its row in ``parents``.
        query_start_loc: each request's first token; of a causal request, only that one gets ``CAUSAL``.
        cu_num_rows: as for ``derive_trees``.
        logits_indices: as for ``derive_trees``.
        input_ids: as for ``derive_trees``.
        positions: as for ``derive_trees``.
        max_depth: as for ``derive_trees``.
        num_drafting_reqs: as for ``derive_trees``.
        buffers: where the trees go, ``StepTrees.allocate``.

    Returns:
        Views of the buffers.

    """
    num_reqs, num_rows, num_nodes = len(idx_mapping), len(logits_indices), parents.shape[1]
    _derive_kernel[(num_reqs,)](
        parents,
        idx_mapping,
        query_start_loc,
        cu_num_rows,
        logits_indices,
        input_ids,
        positions,
        buffers.tokens,
        buffers.parents,
        buffers.positions,
        buffers.root_positions,
        buffers.depths,
        buffers.ancestor_bits,
        max_depth,
        parents.stride(0),
        words=buffers.ancestor_bits.shape[1],
        padded_rows=triton.next_power_of_2(num_nodes + 1),
        num_warps=1,
    )
    return replace(
        buffers,
        cu_num_rows=cu_num_rows,
        logits_indices=logits_indices,
        tokens=buffers.tokens[:num_rows],
        parents=buffers.parents[:num_rows],
        positions=buffers.positions[:num_rows],
        max_depth=max_depth,
        num_drafting_reqs=num_drafting_reqs,
    )


@triton.jit(do_not_specialize=["max_depth", "parents_stride"])
def _derive_kernel(
    draft_parents_ptr: tl.tensor,  # [max_num_reqs, num_nodes]
    idx_mapping_ptr: tl.tensor,  # [num_reqs]
    query_start_loc_ptr: tl.tensor,  # [num_reqs + 1]
    cu_num_rows_ptr: tl.tensor,  # [num_reqs + 1]
    logits_indices_ptr: tl.tensor,  # [num_rows]
    input_ids_ptr: tl.tensor,  # [num_tokens]
    positions_ptr: tl.tensor,  # [num_tokens]
    tokens_ptr: tl.tensor,  # [num_rows]
    parents_ptr: tl.tensor,  # [num_rows]
    row_positions_ptr: tl.tensor,  # [num_rows]
    root_positions_ptr: tl.tensor,  # [num_reqs]
    depths_ptr: tl.tensor,  # [num_tokens]
    ancestor_bits_ptr: tl.tensor,  # [num_tokens, words]
    max_depth: tl.tensor,
    parents_stride: tl.tensor,
    words: tl.constexpr,
    padded_rows: tl.constexpr,
) -> None:
    """Derive one request's tree."""
    request = tl.program_id(0)
    root = tl.load(cu_num_rows_ptr + request)
    num_rows = tl.load(cu_num_rows_ptr + request + 1) - root
    row = tl.arange(0, padded_rows)
    is_row = row < num_rows
    is_node = is_row & (row > 0)
    token = tl.load(logits_indices_ptr + root + row, mask=is_row, other=0).to(tl.int64)

    token_id = tl.load(input_ids_ptr + token, mask=is_row, other=0)
    tl.store(tokens_ptr + root + row, token_id.to(tl.int64), mask=is_row)
    tl.store(input_ids_ptr + token, tl.maximum(token_id, 0), mask=is_row)

    draft_parents = draft_parents_ptr + tl.load(idx_mapping_ptr + request) * parents_stride
    parent = tl.load(draft_parents + row - 1, mask=is_node, other=0)
    tl.store(parents_ptr + root + row, tl.where(is_node, root + parent, -1), mask=is_row)

    # Climb from all rows at once; at each level the rows that are not at the root yet note the row above.
    one = tl.full([padded_rows], 1, tl.int64)
    depth = tl.zeros([padded_rows], tl.int64)
    for word in tl.static_range(words):
        bits = tl.where(row // BITS == word, one << row % BITS, 0)
        above = parent
        climbs = is_node
        for _ in tl.range(0, max_depth):
            bits = tl.where(climbs & (above // BITS == word), bits | (one << above % BITS), bits)
            if word == 0:
                depth += climbs.to(tl.int64)
            climbs = climbs & (above > 0)
            above = tl.load(draft_parents + above - 1, mask=climbs, other=0)
        tl.store(ancestor_bits_ptr + token * words + word, bits, mask=is_row)
    tl.store(depths_ptr + token, depth, mask=is_row)
    position = tl.load(positions_ptr + token, mask=is_row, other=0) + depth - row
    tl.store(positions_ptr + token, position, mask=is_row)
    tl.store(row_positions_ptr + root + row, position, mask=is_row)
    tl.store(root_positions_ptr + request + row, position.to(tl.int32), mask=row == 0)

    first_token = tl.load(query_start_loc_ptr + request).to(tl.int64)
    if first_token < tl.load(logits_indices_ptr + root):
        tl.store(ancestor_bits_ptr + first_token * words, CAUSAL_WORD)
