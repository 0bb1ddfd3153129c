# SPDX-License-Identifier: Apache-2.0
"""The temperature under which a head's probabilities are those of what the target says (Guo et al., arXiv 1706.04599).

It is the one of maximum likelihood: the mean of ``logsumexp(z / T) - z_label / T`` is least. Losses are taken at the
temperatures of a grid while the texts pass by, so no logits are kept; a parabola through the best three gives the rest.
"""

from __future__ import annotations

import math

import torch

GRID = torch.logspace(-2, 2, 17, base=2)
"""``[temperatures]``, from 1/4 to 4; a head that asks for less or more gets the nearest."""

CHUNK = 256
"""Positions whose logits are divided at a time."""


def losses_by_temperature(
    logits: torch.Tensor,  # [positions, rows], float32
    labels: torch.Tensor,  # [positions], int64
) -> torch.Tensor:
    """Return ``[positions, temperatures]``, float32: the cross-entropies at the temperatures of the grid."""
    found = torch.empty(len(labels), len(GRID), device=logits.device)
    for start in range(0, len(labels), CHUNK):
        part = logits[start : start + CHUNK]
        right = part.gather(1, labels[start : start + CHUNK, None])[:, 0]
        for index, inverse in enumerate(GRID.reciprocal().tolist()):
            found[start : start + CHUNK, index] = (part * inverse).logsumexp(dim=-1) - right * inverse
    return found


def best_temperature(
    of_positions: torch.Tensor,  # [positions, temperatures], float32
) -> float:
    """Return the temperature with the least loss on average, of the positions with finite losses; 1 without any."""
    known = of_positions[of_positions.isfinite().all(dim=1)]
    if not len(known):
        return 1.0
    of_grid = known.double().mean(dim=0)
    best = int(of_grid.argmin())
    if not 0 < best < len(GRID) - 1:
        return float(GRID[best])
    before, least, after = of_grid[best - 1 : best + 2].tolist()
    steps = 0.5 * (before - after) / (before - 2 * least + after) if before + after > 2 * least else 0.0
    return float(GRID[best]) * math.exp(steps * math.log(float(GRID[1] / GRID[0])))
