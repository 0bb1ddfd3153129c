"""How often the heads are right."""

from __future__ import annotations

import torch

from vllm_medusa.training.heads import MedusaHeads
from vllm_medusa.training.losses import IGNORED, head_pairs


class RankAccuracy:
    """Counts, for each head, at which of its first ranks the right token stands.

    Args:
        heads: the heads to judge.
        ranks: how many of each head's most likely tokens are looked at.

    """

    def __init__(self, heads: MedusaHeads, ranks: int) -> None:
        self.heads = heads
        self.hits = torch.zeros(heads.spec.num_heads, ranks, dtype=torch.int64)
        self.positions = torch.zeros(heads.spec.num_heads, 1, dtype=torch.int64)

    @torch.no_grad()
    def add(self, hidden: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: ``hidden`` of ``[batch, length, hidden_size]``, ``labels`` of ``[batch, length]``."""
        for head in range(self.heads.spec.num_heads):
            states, targets = head_pairs(head, hidden, labels)
            labelled = targets != IGNORED
            states, targets = states[labelled], targets[labelled]
            best = self.heads.logits(head, states).topk(self.hits.shape[1], dim=-1).indices
            self.hits[head] += (best == targets[:, None]).sum(dim=0).cpu()
            self.positions[head] += len(targets)

    def result(self) -> torch.Tensor:
        """``[heads, ranks]``: the share of positions whose token is the head's choice of exactly that rank."""
        return self.hits / self.positions.clamp(min=1)
