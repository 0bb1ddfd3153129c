# SPDX-License-Identifier: Apache-2.0
"""Tree attention written densely, slow and obviously right: what the others are tested against."""

from __future__ import annotations

import torch


def tree_attention(
    query: torch.Tensor,
    key_context: torch.Tensor,
    value_context: torch.Tensor,
    key_tree: torch.Tensor,
    value_tree: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    depths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from each of one request's tree rows to the whole context and to the row's ancestors.

    A float64 query is computed in float64, every other one in float32; the output has the query's dtype.

    Args:
        query: ``[rows, heads, head_dim]``.
        key_context: ``[context, kv_heads, head_dim]``: the committed tokens; token j is at position j.
        value_context: ``[context, kv_heads, head_dim]``.
        key_tree: ``[rows, kv_heads, head_dim]``: the tree's rows; row i is at position context + its depth.
        value_tree: ``[rows, kv_heads, head_dim]``.
        ancestors: ``[rows, rows]``, bool: row i may attend to row j (j is i itself or above it).
        scale: the scores' factor.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        sliding_window: a row sees only keys fewer than this many positions before its own.
        depths: ``[rows]``, int64: edges between a row and the root; counted from ``ancestors`` by default.

    Returns:
        ``[rows, heads, head_dim]``.

    """
    rows, heads, _ = query.shape
    context, kv_heads, _ = key_context.shape
    compute = torch.promote_types(query.dtype, torch.float32)

    if depths is None:
        depths = ancestors.sum(dim=1) - 1
    position = torch.cat([torch.arange(context, device=query.device), context + depths])
    visible = torch.cat([ancestors.new_ones(rows, context), ancestors], dim=1)  # [rows, context + rows]
    if sliding_window is not None:
        visible = visible & (position[context:, None] - position[None, :] < sliding_window)

    key = torch.cat([key_context, key_tree]).to(compute).repeat_interleave(heads // kv_heads, dim=1)
    value = torch.cat([value_context, value_tree]).to(compute).repeat_interleave(heads // kv_heads, dim=1)
    scores = scale * torch.einsum("qhd,khd->hqk", query.to(compute), key)  # [heads, rows, context + rows]
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
