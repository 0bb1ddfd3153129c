# SPDX-License-Identifier: Apache-2.0
"""How often paths of ranks are right as a whole: heads are not right or wrong independently of each other."""

from __future__ import annotations

from collections import Counter

import torch

from vllm_medusa.tree.best_first import JointPaths
from vllm_medusa.tree.static import RankPath


def count_paths(
    ranks: torch.Tensor,  # [positions, heads], int64
    num_ranks: int,
) -> JointPaths:
    """Return each path's share of the positions.

    Args:
        ranks: the rank at which each head is right, ``num_ranks`` where it is at none. A sequential head's is that
            below the right tokens of the heads before it, which a path that is right has for its parent.
        num_ranks: how many ranks are counted.

    """
    counts: Counter[RankPath] = Counter()
    for of_position in ranks.tolist():
        path: RankPath = ()
        for rank in of_position:
            if rank >= num_ranks:
                break
            path = (*path, rank)
            counts[path] += 1
    return JointPaths({path: count / len(ranks) for path, count in counts.items()})
