# SPDX-License-Identifier: Apache-2.0
"""The heads' accuracy and loss on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.losses import Logits, head_pairs, lm_loss
from vllm_medusa.training.paths import path_tokens


@dataclass(frozen=True)
class Scores:
    """One batch's sums, one row per block, so that devices can gather them.

    Attributes:
        hits: ``[batch, heads, ranks]``, int64: positions whose label is the head's token of exactly that rank.
        losses: ``[batch, heads]``, float32: sums of the cross-entropies at labels that can be drafted.
        positions: ``[batch, heads]``, int64: positions that have a label.
        drafted: ``[batch, heads]``, int64: those whose label can be drafted.

    """

    hits: torch.Tensor
    losses: torch.Tensor
    positions: torch.Tensor
    drafted: torch.Tensor


@torch.no_grad()
def score_heads(
    heads: TrainableHeads,
    hidden: torch.Tensor,  # [batch, length, hidden_size]
    labels: torch.Tensor,  # [batch, length], int64
    ranks: int,
    input_ids: torch.Tensor | None = None,  # [batch, length], int64
) -> Scores:
    """Score each head's ``ranks`` most probable tokens; only one head's logits of one block are in memory at a time.

    A label that the heads cannot draft is a position without a hit. Sequential heads read the path to each label in
    ``input_ids``.
    """
    shape = (len(hidden), heads.spec.num_heads)
    hits = torch.zeros(*shape, ranks, dtype=torch.int64, device=hidden.device)
    losses = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
    positions = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
    drafted = torch.zeros_like(positions)
    rows = heads.rows_of(labels)
    for block in range(shape[0]):
        for head in range(shape[1]):
            states, expected = head_pairs(head, hidden[block : block + 1], rows[block : block + 1])
            positions[block, head] = (labels[block, head + 2 :] != IGNORED).sum()
            known = expected != IGNORED
            drafted[block, head] = known.sum()
            path = None if input_ids is None else path_tokens(head, input_ids[block : block + 1])[known]
            logits, expected = heads.logits(head, states[known], path).float(), expected[known]
            best = logits.topk(min(ranks, logits.shape[-1]), dim=-1).indices
            hits[block, head, : best.shape[1]] = (best == expected[:, None]).sum(dim=0)
            losses[block, head] = functional.cross_entropy(logits, expected, reduction="sum")
    return Scores(hits, losses, positions, drafted)


@dataclass(frozen=True)
class HeldOut:
    """The metrics on held-out data.

    Attributes:
        accuracies: ``[heads][ranks]``: the share of positions whose label is the head's token of exactly that rank.
        losses: ``[heads]``: mean cross-entropies, at labels that can be drafted.
        lm_loss: the target's own mean cross-entropy; None with Medusa-1.

    """

    accuracies: list[list[float]]
    losses: list[float]
    lm_loss: float | None = None

    @classmethod
    def of(
        cls,
        hits: np.ndarray,  # [blocks, heads, ranks]
        losses: np.ndarray,  # [blocks, heads]
        positions: np.ndarray,  # [blocks, heads]
        drafted: np.ndarray,  # [blocks, heads]
        lm_losses: np.ndarray | None = None,  # [blocks]
        lm_positions: np.ndarray | None = None,  # [blocks]
    ) -> HeldOut:
        """Compute the metrics from the scores of all batches."""
        count, known = (np.maximum(each.sum(axis=0), 1) for each in (positions, drafted))
        lm_loss = None
        if lm_losses is not None and lm_positions is not None:
            lm_loss = float(lm_losses.sum() / max(int(lm_positions.sum()), 1))
        return cls((hits.sum(axis=0) / count[:, None]).tolist(), (losses.sum(axis=0) / known).tolist(), lm_loss)

    @property
    def top1(self) -> list[float]:
        return [ranks[0] for ranks in self.accuracies]

    def metrics(self) -> dict[str, float]:
        """Return the metrics by the names under which they are logged."""
        named: Sequence[tuple[str, list[float]]] = (("top1", self.top1), ("loss", self.losses))
        metrics = {f"head{k}_{name}": value for name, values in named for k, value in enumerate(values, start=1)}
        return metrics if self.lm_loss is None else metrics | {"lm_loss": self.lm_loss}


@torch.no_grad()
def score_target(
    logits: Logits,
    hidden: torch.Tensor,  # [batch, length, hidden_size]
    labels: torch.Tensor,  # [batch, length], int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each block's sum of the target's own cross-entropies and its number of labels, ``[batch]`` both."""
    positions = (labels[:, 1:] != IGNORED).sum(dim=1)
    means = [lm_loss(logits, hidden[block : block + 1], labels[block : block + 1]) for block in range(len(hidden))]
    return torch.stack(means) * positions, positions
