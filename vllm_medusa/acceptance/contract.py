# SPDX-License-Identifier: Apache-2.0
"""What an acceptance rule is."""

from __future__ import annotations

from typing import Protocol

import torch


class Acceptance(Protocol):
    """Says which drafted tokens a request keeps without drawing them.

    The walk goes on from a row by a token that the rule has settled there, and otherwise by a draw of the target's own
    sampler (see ``acceptance.typical.settle``). What no rule settles is exact.
    """

    def keeps(
        self,
        log_probs: torch.Tensor,  # [num_nodes], float32
        entropies: torch.Tensor,  # [num_nodes], float32
    ) -> torch.Tensor:
        """Judge each node by the target's distribution at its parent, as the target's sampler would draw from it.

        Args:
            log_probs: the natural logarithm of the node's probability.
            entropies: the distribution's entropy, in nats.

        Returns:
            ``[num_nodes]``, bool. Nodes below one that is not kept are lost, whatever is said of them.

        """
