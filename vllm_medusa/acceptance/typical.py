# SPDX-License-Identifier: Apache-2.0
"""Typical acceptance (paper, section 2.3.1): a drafted token is kept where the target finds it typical.

A node x is kept if ``p(x) > min(epsilon, delta * exp(-H(p)))`` and its parent is kept; the root, which the target has
drawn, always is. p is the target's processed distribution at the parent, from which its sampler would draw there: after
grammar, bias, penalties that count the path to it, temperature, ``min_p``, ``top_k`` and ``top_p``. H is its entropy.
The longest kept branch wins, of equally long ones the one with the greater product of its tokens' p.

The branch's tokens are settled without a draw. At its last row the target's sampler draws as always, and where a child
carries what it drew, the walk goes on exactly as ``acceptance.exact`` does: such tokens are the target's own. So where
the threshold keeps nothing the rule is exact, as it is where p has one token left.

The text depends on what was drafted, and so do a seeded request's draws: the same seed, drafts and engine give the same
text, but not the text that plain decoding gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import NO_TOKEN


@dataclass(frozen=True)
class Typical:
    """The rule of typical acceptance.

    Attributes:
        threshold: the paper's epsilon, 0 to 1: a token more probable than that is always kept.
        alpha: the paper's delta, 0 to 1: the greater the entropy, the less probable may a token be.

    """

    threshold: float
    alpha: float

    def keeps(self, log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """See ``Acceptance``; a distribution that is not a number keeps nothing."""
        return log_probs > (_log(self.alpha) - entropies).clamp(max=_log(self.threshold))


def judge_nodes(
    trees: StepTrees,
    logits: torch.Tensor,  # [num_rows, vocab_size], processed
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows] both, float32
    """Return what ``Acceptance.keeps`` reads: each node's log-probability and its distribution's entropy.

    Of no meaning for roots, and for nodes without a token.
    """
    log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)
    entropies = torch.special.entr(log_probs.exp()).sum(dim=-1)
    parents = trees.parents.clamp(min=0)
    return log_probs[parents, trees.tokens.clamp(min=0)], entropies[parents]


def settle(
    trees: StepTrees,
    kept: torch.Tensor,  # [num_rows], bool
    log_probs: torch.Tensor,  # [num_rows], float32
) -> torch.Tensor:
    """Choose each request's longest kept branch; nothing waits for the device.

    Args:
        trees: the step's trees.
        kept: the nodes that the rule keeps; of no meaning for roots.
        log_probs: the nodes' log-probabilities; of no meaning for roots and for nodes that are not kept.

    Returns:
        ``[num_rows]``, int64: the token after each row that has one on its request's branch, else ``NO_TOKEN``.

    """
    num_rows = len(trees.parents)
    row = torch.arange(num_rows, device=kept.device)
    is_node = trees.parents >= 0
    # Pointers jump as in derive_trees: a root's parent is itself.
    parent = above = torch.where(is_node, trees.parents, row)
    kept = (kept & (trees.tokens >= 0)) | ~is_node
    depth = is_node.long()
    score = torch.where(kept & is_node, log_probs, 0.0)
    for _ in range(trees.max_depth.bit_length()):
        kept = kept & kept[above]
        depth = depth + depth[above]
        score = score + score[above]
        above = above[above]
    best = kept & (depth == _of_requests(above, depth.masked_fill(~kept, -1)))
    best &= score == _of_requests(above, score.masked_fill(~best, -torch.inf))
    # The first of equals; rows grow along a path.
    at = num_rows - 1 - _of_requests(above, (num_rows - 1 - row).masked_fill(~best, -1))[trees.roots.long()]
    # A root has no row to write to; one place more takes that.
    written = torch.where(is_node, trees.parents, num_rows)
    settled = torch.full((num_rows + 1,), NO_TOKEN, dtype=torch.int64, device=kept.device)
    for _ in range(trees.max_depth):
        settled.scatter_(0, written[at], trees.tokens[at])
        at = parent[at]
    return settled[:num_rows]


def _of_requests(
    root: torch.Tensor,  # [num_rows], int64
    values: torch.Tensor,  # [num_rows]
) -> torch.Tensor:
    """Return the greatest value among the rows of each row's request, ``[num_rows]``."""
    return torch.empty_like(values).scatter_reduce_(0, root, values, "amax", include_self=False)[root]


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf
