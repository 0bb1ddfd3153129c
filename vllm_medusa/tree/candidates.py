# SPDX-License-Identifier: Apache-2.0
"""From weighed candidates to the tree of the most probable ones, for all requests in one sort."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from vllm_medusa.tree.drafts import Drafts


def grow_trees(
    scores: torch.Tensor,  # [num_reqs, candidates], float32
    parents: torch.Tensor,  # [num_reqs, candidates], int64
    rows: torch.Tensor,  # [num_nodes + 1], int64
    min_probability: float,
    tokens_of: Callable[[torch.Tensor], torch.Tensor],
) -> Drafts:
    """Make each request's tree of its most probable candidates.

    Args:
        scores: logarithms of the paths' probabilities; candidate 0 is the root, and no path is more probable than its
            parent, which comes before it.
        parents: each one's parent among the candidates.
        rows: 0, 1, ..., as many as the tree has rows.
        min_probability: the least probability of a path that is drafted.
        tokens_of: gives the tokens of candidates ``[num_reqs, num_nodes]``.

    """
    # A stable sort keeps the order of the candidates among equals, in which parents come first.
    best = scores.sort(dim=1, descending=True, stable=True)
    candidate, scores = (each[:, : len(rows)] for each in (best.indices, best.values))
    if min_probability:
        scores = scores.masked_fill(scores < math.log(min_probability), -math.inf)
    row_of = candidate.new_empty(parents.shape)
    row_of.scatter_(1, candidate, rows.expand_as(candidate))
    node, scores = candidate[:, 1:], scores[:, 1:]
    return Drafts(
        tokens=tokens_of(node),
        parents=row_of.gather(1, parents.gather(1, node)),
        lengths=(scores > -math.inf).sum(dim=1),
        log_probs=scores,
    )
