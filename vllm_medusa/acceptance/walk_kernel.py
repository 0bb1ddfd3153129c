"""The walk for GPUs where the target's draws do not depend on the path: one launch for all requests and levels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.tree.batch import TreeBatch


def walk_drawn(
    batch: TreeBatch,
    drawn: torch.Tensor,  # [rows], int
    max_rows: int,
) -> Walk:
    """Walk as ``walk`` does with ``draw = lambda row, walking: drawn[row]``; nothing waits for the device.

    Args:
        batch: the trees.
        drawn: the token that the target's sampler drew at each row.
        max_rows: at least the rows of the largest tree, known on the host.

    Returns:
        A walk of ``batch.max_depth + 1`` levels.

    """
    shape = (len(batch.root), batch.max_depth + 1)
    tokens, rows = (torch.empty(shape, dtype=torch.int64, device=drawn.device) for _ in range(2))
    _walk_kernel[(len(batch.root),)](
        drawn,
        batch.parent,
        batch.token,
        batch.root,
        tokens,
        rows,
        len(batch.parent),
        shape[1],
        padded_rows=triton.next_power_of_2(max_rows),
        num_warps=1,
    )
    return Walk(tokens, rows)


@triton.jit(do_not_specialize=["num_rows", "levels"])
def _walk_kernel(
    drawn_ptr: tl.tensor,  # [rows]
    parent_ptr: tl.tensor,  # [rows]
    token_ptr: tl.tensor,  # [rows]
    root_ptr: tl.tensor,  # [requests]
    walked_tokens_ptr: tl.tensor,  # [requests, levels]
    walked_rows_ptr: tl.tensor,  # [requests, levels]
    num_rows: tl.tensor,
    levels: tl.tensor,
    padded_rows: tl.constexpr,
) -> None:
    """Walk one request's tree."""
    request = tl.program_id(0)
    row = tl.load(root_ptr + request)
    # Rows past the tree's last are other requests', and children of none of its rows.
    candidate = row + tl.arange(0, padded_rows)
    is_row = candidate < num_rows
    parent = tl.load(parent_ptr + candidate, mask=is_row, other=-1)
    token = tl.load(token_ptr + candidate, mask=is_row, other=-1)
    for level in tl.range(0, levels):
        drawn = tl.load(drawn_ptr + row, mask=row >= 0, other=-1).to(tl.int64)
        tl.store(walked_tokens_ptr + request * levels + level, drawn)
        tl.store(walked_rows_ptr + request * levels + level, row)
        is_child = (parent == row) & (token == drawn) & (parent >= 0)
        row = tl.max(tl.where(is_child, candidate, -1), axis=0)
