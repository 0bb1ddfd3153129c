# SPDX-License-Identifier: Apache-2.0
"""The parents of drafts that wait for their verification: on the device, and for grammars on the host."""

from __future__ import annotations

import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from vllm_medusa.structured_output.tokens import TreeTokens
from vllm_medusa.tree.drafts import Drafts


class WaitingDrafts:
    """Keeps each request's tree from the step that drafts it to the one that verifies it.

    The tokens wait in V2's own ``req_states.draft_tokens``. A request's state index is its row in V2's states. The
    scheduler makes up drafts for some new requests, for which any tree will do, such as that of the row's last request.

    Attributes:
        by_state: ``[max_num_reqs, num_nodes]``, int64: ``Drafts.parents``.

    """

    def __init__(self, num_nodes: int, max_num_reqs: int, device: torch.device) -> None:
        self.by_state = torch.arange(num_nodes, device=device).repeat(max_num_reqs, 1)

    def keep(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs], int64
        drafts: Drafts,
    ) -> None:
        """Note what the drafts of requests look like, by state index."""
        self.by_state[idx_mapping] = drafts.parents


class TreeTokensHandler(DraftTokensHandler):
    """Copies drafts to the host for the scheduler's grammars as vLLM's does, and their trees in the same copy."""

    def __init__(self, drafts: WaitingDrafts, device: torch.device) -> None:
        super().__init__(device)
        self._drafts = drafts

    def set_draft_tokens(
        self,
        input_batch: InputBatch,
        draft_tokens: torch.Tensor,  # [num_reqs, num_nodes], int64
    ) -> None:
        """Start the copy where a request of the step follows a grammar (see ``DraftTokensHandler``)."""
        if input_batch.has_structured_output_reqs:
            parents = self._drafts.by_state[input_batch.idx_mapping, : draft_tokens.shape[1]]
            draft_tokens = torch.cat((draft_tokens, parents), dim=1)
        super().set_draft_tokens(input_batch, draft_tokens)

    def get_draft_tokens(self) -> DraftTokenIds | None:
        """Return the drafts, as ``TreeTokens`` where a request of the step follows a grammar."""
        drafts = super().get_draft_tokens()
        if drafts is None or self.draft_tokens_np is None:
            return drafts
        num_nodes = self.num_draft_tokens // 2
        trees = [TreeTokens(row[:num_nodes], row[num_nodes:]) for row in drafts.draft_token_ids]
        return DraftTokenIds(drafts.req_ids, trees)
