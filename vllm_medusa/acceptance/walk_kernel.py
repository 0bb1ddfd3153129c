# SPDX-License-Identifier: Apache-2.0
"""The walk for GPUs where the target's draws do not depend on the path: one launch for all requests and levels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.step.trees import StepTrees


def walk_drawn(
    trees: StepTrees,
    drawn: torch.Tensor,  # [num_rows], int
    max_rows: int,
) -> Walk:
    """Walk as ``walk`` does with ``draw = lambda row, walking: drawn[row]``; nothing waits for the device.

    Args:
        trees: the step's trees.
        drawn: the token that the target's sampler drew at each row.
        max_rows: at least the rows of the largest tree, known on the host.

    Returns:
        A walk of ``trees.max_depth + 1`` levels.

    """
    num_reqs, levels = len(trees.roots), trees.max_depth + 1
    tokens, rows = torch.empty(2, num_reqs, levels, dtype=torch.int64, device=drawn.device)
    lengths = torch.empty(num_reqs, dtype=torch.int32, device=drawn.device)
    stopped_at = torch.empty(num_reqs, dtype=torch.int64, device=drawn.device)
    _walk_kernel[(num_reqs,)](
        drawn,
        trees.parents,
        trees.tokens,
        trees.cu_num_rows,
        trees.logits_indices,
        tokens,
        rows,
        lengths,
        stopped_at,
        len(trees.parents),
        levels,
        padded_rows=triton.next_power_of_2(max_rows),
        num_warps=1,
    )
    return Walk(tokens, rows, lengths, stopped_at)


@triton.jit(do_not_specialize=["num_rows", "levels"])
def _walk_kernel(
    drawn_ptr: tl.tensor,  # [num_rows]
    parent_ptr: tl.tensor,  # [num_rows]
    token_ptr: tl.tensor,  # [num_rows]
    cu_num_rows_ptr: tl.tensor,  # [num_reqs + 1]
    logits_indices_ptr: tl.tensor,  # [num_rows]
    walked_tokens_ptr: tl.tensor,  # [num_reqs, levels]
    walked_rows_ptr: tl.tensor,  # [num_reqs, levels]
    lengths_ptr: tl.tensor,  # [num_reqs]
    stopped_at_ptr: tl.tensor,  # [num_reqs]
    num_rows: tl.tensor,
    levels: tl.tensor,
    padded_rows: tl.constexpr,
) -> None:
    """Walk one request's tree."""
    request = tl.program_id(0)
    row = tl.load(cu_num_rows_ptr + request).to(tl.int64)
    # Rows past the tree's last are other requests', and children of none of its rows.
    tree_row = row + tl.arange(0, padded_rows)
    is_row = tree_row < num_rows
    parent = tl.load(parent_ptr + tree_row, mask=is_row, other=-1)
    token = tl.load(token_ptr + tree_row, mask=is_row, other=-1)
    last_row = row
    length = request * 0
    for level in tl.range(0, levels):
        drawn = tl.load(drawn_ptr + row, mask=row >= 0, other=-1).to(tl.int64)
        tl.store(walked_tokens_ptr + request * levels + level, drawn)
        tl.store(walked_rows_ptr + request * levels + level, row)
        length += (row >= 0).to(tl.int32)
        # Rows grow along a path.
        last_row = tl.maximum(last_row, row)
        is_child = (parent == row) & (token == drawn) & (parent >= 0)
        row = tl.max(tl.where(is_child, tree_row, -1), axis=0)
    tl.store(lengths_ptr + request, length)
    tl.store(stopped_at_ptr + request, tl.load(logits_indices_ptr + last_row).to(tl.int64))
