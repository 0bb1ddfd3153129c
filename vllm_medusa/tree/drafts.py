# SPDX-License-Identifier: Apache-2.0
"""Drafts: what one step's heads propose and the next step's target verifies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

NO_TOKEN = -1
"""Fills the places where there is no token (vLLM's ``PLACEHOLDER_TOKEN_ID``)."""


@dataclass(frozen=True, eq=False)
class Drafts:
    """A draft tree for each request.

    Node j of a request is row j + 1 of its tree; row 0 is the root, the token that the target has sampled already.
    Parents come before their children, so every prefix of a draft is a tree.

    Attributes:
        tokens: ``[num_reqs, num_nodes]``, int64; of no meaning past a draft's length.
        parents: ``[num_reqs, num_nodes]``, int64: the row of each node's parent, in all of the draft, also past its
            length.
        lengths: ``[num_reqs]``, int64: each draft's number of nodes.
        log_probs: ``[num_reqs, num_nodes]``, float32: how probable the heads think each node's path is; None where the
            tree does not follow the heads' probabilities.

    """

    tokens: torch.Tensor
    parents: torch.Tensor
    lengths: torch.Tensor
    log_probs: torch.Tensor | None = None

    def cut(
        self,
        most: torch.Tensor,  # [num_reqs], int64
    ) -> Drafts:
        """Return the drafts with at most so many nodes, the first ones of each."""
        return replace(self, lengths=self.lengths.minimum(most))

    def padded_tokens(self) -> torch.Tensor:
        """Return ``tokens`` with ``NO_TOKEN`` past each draft's length."""
        node = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.tokens.masked_fill(node >= self.lengths[:, None], NO_TOKEN)
