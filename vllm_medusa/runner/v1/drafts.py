# SPDX-License-Identifier: Apache-2.0
"""The parents of drafts that wait for their verification, by request id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from vllm_medusa.tree.drafts import Drafts


class WaitingDrafts:
    """Keeps each request's tree from the step that drafts it to the one that verifies it.

    The tokens travel through vLLM's scheduler, which knows nothing of trees; this is what it does not carry. It may cut
    a draft, and makes up drafts for some new requests, for which any tree will do.
    """

    def __init__(self, num_nodes: int) -> None:
        self._any = torch.arange(num_nodes)
        self._parents: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def keep(self, req_ids: Sequence[str], drafts: Drafts) -> None:
        """Note what the requests' drafts look like."""
        self._parents.update(zip(req_ids, drafts.parents, strict=True))

    def parents(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Return ``Drafts.parents`` of the requests, ``[num_reqs, num_nodes]``, int64."""
        return torch.stack([self._parents.get(req_id, self._any) for req_id in req_ids])

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is known of requests that have ended."""
        for req_id in req_ids:
            self._parents.pop(req_id, None)
