# SPDX-License-Identifier: Apache-2.0
"""The training losses, computed in chunks of positions to save memory."""

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
"""The default number of positions whose logits are in memory at the same time."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Maps the target's hidden states, ``[positions, hidden_size]``, to its logits, ``[positions, vocab_size]``."""


@dataclass(frozen=True)
class LabelCounts:
    """The number of labels of a whole optimizer step, by which the losses of its batches are divided.

    A step's loss is the mean over all its labels, on all batches and devices. So a batch contributes the sum over its
    own labels, divided by the step's number of labels.

    Attributes:
        target: labels of the target's own loss.
        heads: labels of each head's loss.

    """

    target: float
    heads: tuple[float, ...]

    @classmethod
    def of(cls, counted: torch.Tensor) -> LabelCounts:
        """Convert the result of ``count_labels``, or a sum or mean of several."""
        target, *heads = counted.tolist()
        return cls(target, tuple(heads))


def count_labels(
    labels: torch.Tensor,  # [batch, length], int64
    num_heads: int,
) -> torch.Tensor:
    """Return ``[1 + num_heads]``, int64: the number of labels of the target's own loss and of each head's."""
    return torch.stack([(labels[:, offset:] != IGNORED).sum() for offset in range(1, num_heads + 2)])


def medusa_loss(
    heads: TrainableHeads,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    decay: float = 0.8,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
) -> torch.Tensor:
    """Return the heads' loss, ``sum_k decay^k CE_k`` (the paper's equation 1), a scalar.

    Only one head's logits of one chunk are in memory at a time; the backward pass computes them again.

    Args:
        heads: the heads; head k = 1..K at position t is compared with the label at t + 1 + k.
        hidden: ``[batch, length, hidden_size]``: the target's hidden states after its final norm.
        labels: ``[batch, length]``, int64: the token at each position, or ``IGNORED``.
        decay: weight of head k relative to head k - 1.
        chunk_size: positions per chunk.
        counts: the step's label counts; default: this batch's.

    """
    counts = counts or LabelCounts.of(count_labels(labels, heads.spec.num_heads))
    total = hidden.new_zeros((), dtype=torch.float32)
    for head in range(heads.spec.num_heads):
        states, expected = head_pairs(head, hidden, labels)
        summed = _in_chunks(partial(_cross_entropy, partial(heads.logits, head)), chunk_size, states, expected)
        total = total + decay ** (head + 1) * summed / (counts.heads[head] or 1)
    return total


def lm_loss(
    logits: Logits,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
) -> torch.Tensor:
    """Return the target's own cross-entropy (L_LM, paper, section 2.2.2), a scalar: position t, label at t + 1.

    The arguments are those of ``medusa_loss``.
    """
    states, expected = _shifted(1, hidden, labels)
    return _in_chunks(partial(_cross_entropy, logits), chunk_size, states, expected) / _target_count(labels, counts)


def distillation_loss(
    logits: Logits,
    hidden: torch.Tensor,
    original: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
) -> torch.Tensor:
    """Return ``KL(original target || trained target)`` (paper, section 2.3.2), a scalar that replaces L_LM.

    ``hidden`` and ``original``, shaped alike, are the hidden states of the trained and of the original target. Both
    have the LM head ``logits``. The other arguments are those of ``medusa_loss``.
    """
    states, expected = _shifted(1, hidden, labels)
    teachers, _ = _shifted(1, original, labels)
    summed = _in_chunks(partial(_divergence, logits), chunk_size, states, teachers, expected)
    return summed / _target_count(labels, counts)


def head_pairs(head: int, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair each hidden state with the label, ``head + 2`` positions later, that a head must predict from it.

    Args:
        head: the head, counted from 0.
        hidden: ``[batch, length, hidden_size]``.
        labels: ``[batch, length]``.

    Returns:
        ``[pairs, hidden_size]`` and ``[pairs]``, with ``pairs = batch * (length - head - 2)``.

    """
    return _shifted(head + 2, hidden, labels)


def _shifted(offset: int, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden[:, :-offset].flatten(0, 1), labels[:, offset:].flatten()


def _target_count(labels: torch.Tensor, counts: LabelCounts | None) -> float:
    return (counts or LabelCounts.of(count_labels(labels, 0))).target or 1


def _in_chunks(summed: Callable[..., torch.Tensor], chunk_size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Apply ``summed``, a sum over positions, to chunks of the tensors' rows, and add up the results."""
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
