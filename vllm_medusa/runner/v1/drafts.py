# SPDX-License-Identifier: Apache-2.0
"""The parents of drafts that wait for their verification, by request id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from vllm_medusa.structured_output.tokens import TreeTokens
from vllm_medusa.tree.drafts import Drafts


class WaitingDrafts:
    """Keeps each request's tree from the step that drafts it to the one that verifies it.

    The tokens travel through vLLM's scheduler, which knows nothing of trees; this is what it does not carry. It may cut
    a draft, and makes up drafts for some new requests, for which any tree will do. A grammar may leave out nodes.
    """

    def __init__(self, num_nodes: int) -> None:
        self._any = torch.arange(num_nodes)
        self._parents: dict[str, torch.Tensor] = {}
        self._nodes: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def keep(self, req_ids: Sequence[str], drafts: Drafts) -> None:
        """Note what the requests' drafts look like."""
        self._parents.update(zip(req_ids, drafts.parents, strict=True))
        self._nodes.clear()

    def leave_out(self, scheduled: Mapping[str, list[int]]) -> None:
        """Note what grammars have left of drafts, given the step's ``SchedulerOutput.scheduled_spec_decode_tokens``."""
        for req_id, tokens in scheduled.items():
            if isinstance(tokens, TreeTokens) and tokens.nodes is not None:
                rest = range(len(tokens.parents), len(self._any))
                self._parents[req_id] = torch.tensor([*tokens.parents, *rest])
                self._nodes[req_id] = np.array([*tokens.nodes, *rest])

    def parents(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Return ``Drafts.parents`` of the requests, ``[num_reqs, num_nodes]``, int64."""
        return torch.stack([self._parents.get(req_id, self._any) for req_id in req_ids])

    def drafted_nodes(
        self,
        req_ids: Sequence[str],
        request: np.ndarray,  # [num_rows], int64
        node: np.ndarray,  # [num_rows], int64
    ) -> np.ndarray:  # [num_rows], int64
        """Return which node of the draft, as it was kept, each row's node is; -1 for roots.

        Args:
            req_ids: the step's requests.
            request: the index among them of each row's.
            node: the row's node in the draft as it is verified; -1 for roots.

        """
        if not self._nodes:
            return node
        every = self._any.numpy()
        drafted = np.stack([self._nodes.get(req_id, every) for req_id in req_ids])
        return np.where(node >= 0, drafted[request, node], node)

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is known of requests that have ended."""
        for req_id in req_ids:
            self._parents.pop(req_id, None)
