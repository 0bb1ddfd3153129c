# SPDX-License-Identifier: Apache-2.0
"""The parents of drafts that wait for their verification, by slot, on the device."""

from __future__ import annotations

import torch

from vllm_medusa.tree.drafts import Drafts


class WaitingDrafts:
    """Keeps each request's tree from the step that drafts it to the one that verifies it.

    The tokens wait in V2's own ``req_states.draft_tokens``. A slot is a request's row in V2's states. The scheduler
    makes up drafts for some new requests, for which any tree will do, such as that of the slot's last request.

    Attributes:
        by_slot: ``[max_num_reqs, num_nodes]``, int64: ``Drafts.parents``.

    """

    def __init__(self, num_nodes: int, max_num_reqs: int, device: torch.device) -> None:
        self.by_slot = torch.arange(num_nodes, device=device).repeat(max_num_reqs, 1)

    def keep(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs], int64
        drafts: Drafts,
    ) -> None:
        """Note what the drafts of the requests in these slots look like."""
        self.by_slot[idx_mapping] = drafts.parents
