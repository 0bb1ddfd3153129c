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
from vllm_medusa.training.divergence import Expected, linear_divergence
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.paths import path_tokens
from vllm_medusa.training.teacher import TopTokens

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
        heads: labels of each head's loss; those that the head cannot draft are not counted.

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
    heads: TrainableHeads,
) -> torch.Tensor:
    """Return ``[1 + num_heads]``, int64: the number of labels of the target's own loss and of each head's."""
    rows = heads.rows_of(labels)
    counts = [(labels[:, 1:] != IGNORED).sum()]
    counts += [(rows[:, head + 2 :] != IGNORED).sum() for head in range(heads.spec.num_heads)]
    return torch.stack(counts)


def medusa_loss(
    heads: TrainableHeads,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    decay: float = 0.8,
    chunk_size: int = CHUNK_SIZE,
    counts: LabelCounts | None = None,
    teacher: TopTokens | None = None,
    input_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the heads' loss, ``sum_k decay^k CE_k`` (the paper's equation 1), a scalar.

    It is taken where a label is, but not at labels that the heads cannot draft. With ``teacher`` each head's loss is
    the divergence ``KL(target || head)`` in place of CE. Of the target's distribution only the most probable tokens are
    known. The others are the tail, a single outcome: a head must leave as much probability to all of them together as
    the target does, but it may divide this among them as it likes. Known tokens that the heads cannot draft are left
    out, as such labels are (see ``Expected``).

    Heads that share an LM head are multiplied by it together. Only one chunk's logits are in memory at a time.

    Args:
        heads: the heads; head k = 1..K at position t is compared with the label at t + 1 + k.
        hidden: ``[batch, length, hidden_size]``: the target's hidden states after its final norm.
        labels: ``[batch, length]``, int64: the token at each position, or ``IGNORED``.
        decay: weight of head k relative to head k - 1.
        chunk_size: positions per chunk, counted for each head.
        counts: the step's label counts; default: this batch's.
        teacher: the target's most probable tokens; default: labels are learnt.
        input_ids: ``[batch, length]``, int64: the text, of which sequential heads read the path to each label.

    """
    counts = counts or LabelCounts.of(count_labels(labels, heads))
    rows = heads.rows_of(labels)
    states, expected = [], []
    for head, count in enumerate(counts.heads):
        of_head, of_labels = head_pairs(head, hidden, rows)
        labelled = of_labels != IGNORED
        path = None if input_ids is None else path_tokens(head, input_ids)[labelled]
        states.append(heads.states(head, of_head[labelled], path))
        weight = decay ** (head + 1) / (count or 1)
        if teacher is None:
            expected.append(Expected.labels(of_labels[labelled], weight))
        else:
            # The target's distribution of the token at t + 1 + k is that of position t + k.
            top = teacher.tokens, teacher.log_probs
            tokens, log_probs = (each[:, head + 1 : -1].flatten(0, 1)[labelled] for each in top)
            weights = torch.full((len(tokens),), weight, device=hidden.device)
            expected.append(Expected(heads.rows_of(tokens.long()), log_probs.float().exp(), weights))
    if heads.spec.shared_lm_head:
        states, expected = [torch.cat(states)], [Expected.cat(expected)]
    pairs = zip(states, expected, strict=True)
    losses = [linear_divergence(*pair, heads.lm_head(head), chunk_size) for head, pair in enumerate(pairs)]
    return torch.stack(losses).sum()


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
    return (int((labels[:, 1:] != IGNORED).sum()) if counts is None else counts.target) or 1


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
