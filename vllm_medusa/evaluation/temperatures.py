# SPDX-License-Identifier: Apache-2.0
"""The temperature under which a head's probabilities are those of what the target says (Guo et al., arXiv 1706.04599).

It is the one of maximum likelihood: the mean of ``logsumexp(z / T) - z_label / T`` is least. The sums are taken at the
temperatures of a grid while the texts pass by, so no logits are kept; a parabola through the best three gives the rest.
"""

from __future__ import annotations

import math

import torch

GRID = torch.logspace(-2, 2, 17, base=2)
"""``[temperatures]``, from 1/4 to 4; a head that asks for less or more gets the nearest."""

CHUNK = 256
"""Positions whose logits are divided at a time."""


def losses(
    logits: torch.Tensor,  # [positions, rows], float32
    labels: torch.Tensor,  # [positions], int64
) -> torch.Tensor:
    """Return ``[temperatures]``, float64: the sums of the cross-entropies at the temperatures of the grid."""
    summed = torch.zeros(len(GRID), dtype=torch.float64)
    for part, of_part in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        right = part.gather(1, of_part[:, None])[:, 0]
        for index, inverse in enumerate(GRID.reciprocal().tolist()):
            summed[index] += ((part * inverse).logsumexp(dim=-1) - right * inverse).sum(dtype=torch.float64).cpu()
    return summed


def best_temperature(
    of_grid: torch.Tensor,  # [temperatures], float64
) -> float:
    """Return the temperature with the least loss."""
    best = int(of_grid.argmin())
    if not 0 < best < len(GRID) - 1:
        return float(GRID[best])
    before, least, after = of_grid[best - 1 : best + 2].tolist()
    steps = 0.5 * (before - after) / (before - 2 * least + after) if before + after > 2 * least else 0.0
    return float(GRID[best]) * math.exp(steps * math.log(float(GRID[1] / GRID[0])))
