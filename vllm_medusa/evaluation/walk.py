# SPDX-License-Identifier: Apache-2.0
"""At which positions of a text steps begin.

Where heads are right for long, a step passes over many positions, and where they are wrong it stops. So steps see the
hard positions more often than the text has them, and a mean over all positions promises more than is served.
"""

from __future__ import annotations

import torch

from vllm_medusa.data.packing import IGNORED
from vllm_medusa.tree.static import RankPath, StaticTree


def visited(
    ranks: torch.Tensor,  # [length, heads], int64
    tree: StaticTree,
) -> torch.Tensor:
    """Decode a text with a tree.

    Args:
        ranks: at each position the rank at which each head is right; ``IGNORED`` where no label is.
        tree: what is verified at each step.

    Returns:
        ``[length]``, bool: where steps begin. Positions are left out after which a head has no label; each run of the
        others is decoded from its beginning.

    """
    paths = set(map(tuple, tree.choices))
    begins = torch.zeros(len(ranks), dtype=torch.bool)
    ahead = 0
    for position, of_position in enumerate(ranks.tolist()):
        if IGNORED in of_position:
            ahead = position + 1
        elif position >= ahead:
            begins[position] = True
            ahead = position + 1 + _accepted(of_position, paths)
    return begins


def _accepted(of_position: list[int], paths: set[RankPath]) -> int:
    """Return how many tokens the tree's branch has that is right."""
    return next(
        (depth for depth in range(len(of_position)) if tuple(of_position[: depth + 1]) not in paths), len(of_position)
    )
