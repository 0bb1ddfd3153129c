"""The training losses, each taken a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.heads import TrainableHeads

CHUNK_SIZE = 4096
"""Positions whose logits are held at once, unless a caller says otherwise."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Maps the target's hidden states, ``[positions, hidden_size]``, to its logits, ``[positions, vocab_size]``."""


@dataclass(frozen=True)
class LabelCounts:
    """How many labels each term of the loss is a mean over.

    A step's loss is a mean over all its labels, however they are spread over batches and devices. So a batch's share of
    it is a sum over its own labels, divided by the counts of the whole step.

    Attributes:
        target: the labels of the target's own loss.
        heads: those of each head's.

    """

    target: float
    heads: tuple[float, ...]

    @classmethod
    def of(cls, counted: torch.Tensor) -> LabelCounts:
        """Read what ``count_labels`` returned, or a sum or mean of that."""
        target, *heads = counted.tolist()
        return cls(target, tuple(heads))


def count_labels(
    labels: torch.Tensor,  # [batch, length], int64
    num_heads: int,
) -> torch.Tensor:
    """Return ``[1 + num_heads]``, int64: on how many positions the target's own loss is taken, and each head's."""
    return torch.stack([(labels[:, offset:] != IGNORED).sum() for offset in range(1, num_heads + 2)])


def medusa_loss(
    heads: TrainableHeads,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    decay: float = 0.8,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
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
        counts: what the sums are divided by; None: the labels of this batch.

    Returns:
        A scalar; each head's term is a mean over its positions that have a label.

    """
    counts = counts or LabelCounts.of(count_labels(labels, heads.spec.num_heads))
    total = hidden.new_zeros((), dtype=torch.float32)
    for head in range(heads.spec.num_heads):
        states, targets = head_pairs(head, hidden, labels)
        summed = _in_chunks(partial(_cross_entropy, partial(heads.logits, head)), chunk_size, states, targets)
        total = total + decay ** (head + 1) * summed / (counts.heads[head] or 1)
    return total


def lm_loss(
    logits: Logits,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
) -> torch.Tensor:
    """Return the target's own cross-entropy (L_LM, paper, section 2.2.2): position t against the label at t + 1.

    Args:
        logits: the target's LM head.
        hidden: ``[batch, length, hidden_size]``: the target's hidden states after its final norm.
        labels: ``[batch, length]``, int64: the token at each position, or ``IGNORED``.
        chunk_size: positions whose logits are held at once.
        counts: what the sum is divided by; None: the labels of this batch.

    Returns:
        A scalar, the mean over the positions that have a label.

    """
    states, targets = _shifted(1, hidden, labels)
    return _in_chunks(partial(_cross_entropy, logits), chunk_size, states, targets) / _target_count(labels, counts)


def distillation_loss(
    logits: Logits,
    hidden: torch.Tensor,
    original: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
) -> torch.Tensor:
    """Return ``KL(original target || trained target)`` (paper, section 2.3.2), which takes the place of L_LM.

    Args:
        logits: the LM head of both.
        hidden: ``[batch, length, hidden_size]``: the trained target's hidden states after its final norm.
        original: ``[batch, length, hidden_size]``: the original target's.
        labels: ``[batch, length]``, int64: only positions whose next token has a label count.
        chunk_size: positions whose logits are held at once.
        counts: what the sum is divided by; None: the labels of this batch.

    Returns:
        A scalar, the mean over the positions that count.

    """
    states, targets = _shifted(1, hidden, labels)
    teachers, _ = _shifted(1, original, labels)
    return _in_chunks(partial(_divergence, logits), chunk_size, states, teachers, targets) / _target_count(
        labels, counts
    )


def head_pairs(head: int, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair each position's hidden state with the label that a head must predict from it.

    Args:
        head: the head, counted from 0, whose label is ``head + 2`` positions further on.
        hidden: ``[batch, length, hidden_size]``.
        labels: ``[batch, length]``.

    Returns:
        ``[pairs, hidden_size]`` and ``[pairs]``, ``pairs = batch * (length - head - 2)``.

    """
    return _shifted(head + 2, hidden, labels)


def _shifted(offset: int, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden[:, :-offset].flatten(0, 1), labels[:, offset:].flatten()


def _target_count(labels: torch.Tensor, counts: LabelCounts | None) -> float:
    return (counts or LabelCounts.of(count_labels(labels, 0))).target or 1


def _in_chunks(summed: Callable[..., torch.Tensor], chunk_size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Add up a sum over positions, of which all tensors hold one per row."""
    if len(tensors[0]) <= chunk_size:
        return summed(*tensors)
    chunks = zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True)
    parts = [checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum()


def _cross_entropy(logits: Logits, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


def _divergence(logits: Logits, hidden: torch.Tensor, original: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    trained = logits(hidden).float().log_softmax(dim=-1)
    with torch.no_grad():
        teacher = logits(original).float().log_softmax(dim=-1)
    each = functional.kl_div(trained, teacher, reduction="none", log_target=True).sum(dim=-1)
    return each.masked_fill(labels == IGNORED, 0.0).sum()
