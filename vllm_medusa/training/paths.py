# SPDX-License-Identifier: Apache-2.0
"""What a sequentially dependent head adds to its state: a term of the path to the node that it continues.

``z_k = block_k(h) + Q_k SiLU(P_k h + sum_j U_kj e(x_j))``, with e the target's own input embedding, scaled to a root
mean square of 1, and x_j the tokens from the root down to the node, k of them for head k. The dependence is Hydra's
(arXiv 2402.05109); the sum grows by one term a depth, so that nodes of a tree share their ancestors' part.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_medusa.checkpoint.format import NORM_EPS


class PathTerm(nn.Module):
    """The term of one head, which reads ``length`` tokens; it starts at zero."""

    def __init__(self, hidden_size: int, rank: int, length: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank)
        self.tokens = nn.ModuleList(nn.Linear(hidden_size, rank, bias=False) for _ in range(length))
        self.up = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(
        self,
        hidden: torch.Tensor,  # [positions, hidden_size]
        embedded: torch.Tensor,  # [positions, length, hidden_size]
    ) -> torch.Tensor:
        """Return the term, ``[positions, hidden_size]``."""
        inner = self.down(hidden)
        for place, layer in enumerate(self.tokens):
            inner = inner + layer(embedded[:, place])
        return self.up(functional.silu(inner))


def normed(
    embedded: torch.Tensor,  # [..., hidden_size]
) -> torch.Tensor:
    """Return input embeddings as heads read them."""
    return functional.rms_norm(embedded, embedded.shape[-1:], eps=NORM_EPS)


def path_tokens(
    head: int,
    input_ids: torch.Tensor,  # [batch, length], int64
) -> torch.Tensor:
    """Return the tokens that a head, counted from 0, reads at each position: those of the true text.

    Returns:
        ``[pairs, head + 1]``, in the order of ``head_pairs``.

    """
    pairs = input_ids.shape[1] - head - 2
    return torch.stack([input_ids[:, 1 + place : 1 + place + pairs] for place in range(head + 1)], dim=-1).flatten(0, 1)
