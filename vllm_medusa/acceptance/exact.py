# SPDX-License-Identifier: Apache-2.0
"""Exact acceptance: the target's own draws walk the tree, one level at a time.

Every emitted token is a draw of the target's sampler from the target's logits at the row where the request stands, and
a request draws once for each token that it emits. So the text has the target's distribution whatever the sampling
parameters, and a seeded request emits what it would emit without speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import NO_TOKEN

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``draw(row [num_reqs], walking [num_reqs] bool) -> token [num_reqs]``; tokens of stopped requests are ignored."""


@dataclass(frozen=True, eq=False)
class Walk:
    """Where each request went.

    Attributes:
        tokens: ``[num_reqs, levels]``, int64: the emitted tokens, then -1. The last one emitted is carried by no row.
        rows: ``[num_reqs, levels]``, int64: the row each token was drawn at, -1 after the last one.
        lengths: ``[num_reqs]``, int32: emitted tokens, the accepted drafts and the one after them.
        stopped_at: ``[num_reqs]``, int64: the row at which each request stopped, as an index among the step's tokens.

    """

    tokens: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    stopped_at: torch.Tensor

    @classmethod
    def along(
        cls,
        trees: StepTrees,
        tokens: torch.Tensor,  # [num_reqs, levels], int64
        rows: torch.Tensor,  # [num_reqs, levels], int64
    ) -> Walk:
        """Return the walk along these rows."""
        lengths = (rows >= 0).sum(dim=1, dtype=torch.int32)
        return cls(tokens, rows, lengths, trees.logits_indices[rows.amax(dim=1)])

    @property
    def last_tokens(self) -> torch.Tensor:
        """``[num_reqs]``, int64: the last token that each request emitted, the root of its next tree."""
        return self.tokens.gather(1, self.lengths.long()[:, None] - 1).squeeze(1)

    def shifted(self, first_row: int) -> Walk:
        """Return the walk in a step where this one's row 0 is that row."""
        return replace(self, rows=torch.where(self.rows >= 0, self.rows + first_row, NO_TOKEN))

    @staticmethod
    def cat(walks: Sequence[Walk]) -> Walk:
        """Join the walks of requests that follow each other; they have as many levels."""
        names = (each.name for each in fields(Walk))
        return Walk(*(torch.cat([getattr(walk, name) for walk in walks]) for name in names))


def walk(trees: StepTrees, draw: Draw, *, may_wait: bool = True) -> Walk:
    """Walk every request's tree from its root, one draw a level, until no child carries the token drawn.

    Args:
        trees: the step's trees.
        draw: the target's sampler; called once a level, at most ``trees.max_depth + 1`` times.
        may_wait: whether to look, after each level, if some request walks on; otherwise every level is drawn.

    """
    row = trees.roots.long()
    walking = torch.ones_like(row, dtype=torch.bool)
    tokens, rows = [], []
    for level in range(trees.max_depth + 1):
        drawn = draw(row, walking)
        tokens.append(torch.where(walking, drawn, NO_TOKEN))
        rows.append(torch.where(walking, row, NO_TOKEN))
        if level == trees.max_depth:
            break
        child = trees.children(row, drawn)
        walking = walking & (child >= 0)
        if may_wait and not walking.any():
            break
        row = torch.where(walking, child, row)
    return Walk.along(trees, torch.stack(tokens, dim=1), torch.stack(rows, dim=1))
