"""The heads' training loss."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vllm_medusa.training.heads import MedusaHeads

IGNORED = -100
"""The label of a position that no head is trained on."""


def medusa_loss(
    heads: MedusaHeads,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    decay: float = 0.8,
    chunk_size: int = 4096,
) -> torch.Tensor:
    """Sum the heads' cross-entropies, ``sum_k decay^k CE_k`` (the paper's equation 1).

    Positions beyond ``chunk_size`` are taken chunk by chunk, and the backward pass computes their logits again: no more
    than one head's logits of one chunk exist at a time.

    Args:
        heads: the heads; head k = 1..K at position t is compared with the label at t + 1 + k.
        hidden: ``[batch, length, hidden_size]``: the target's hidden states after its final norm.
        labels: ``[batch, length]``, int64: the token at each position, or ``IGNORED``.
        decay: weight of head k relative to that of head k - 1.
        chunk_size: positions whose logits are held at once.

    Returns:
        A scalar; each head's term is a mean over its positions that have a label.

    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for head in range(heads.spec.num_heads):
        states, targets = head_pairs(head, hidden, labels)
        count = (targets != IGNORED).sum().clamp(min=1)
        if len(states) <= chunk_size:
            summed = _summed_loss(heads, head, states, targets)
        else:
            summed = hidden.new_zeros((), dtype=torch.float32)
            for pairs in zip(states.split(chunk_size), targets.split(chunk_size), strict=True):
                summed = summed + checkpoint(_summed_loss, heads, head, *pairs, use_reentrant=False)
        total = total + decay ** (head + 1) * summed / count
    return total


def head_pairs(head: int, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair each position's hidden state with the label that a head must predict from it.

    Args:
        head: the head, counted from 0, whose label is ``head + 2`` positions further on.
        hidden: ``[batch, length, hidden_size]``.
        labels: ``[batch, length]``.

    Returns:
        ``[pairs, hidden_size]`` and ``[pairs]``, ``pairs = batch * (length - head - 2)``.

    """
    offset = head + 2
    return hidden[:, :-offset].flatten(0, 1), labels[:, offset:].flatten()


def _summed_loss(heads: MedusaHeads, head: int, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = heads.logits(head, hidden).float()
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
