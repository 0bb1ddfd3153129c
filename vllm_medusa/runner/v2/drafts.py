"""The trees that requests' drafts follow, from the step that proposes them to the one that verifies them (V2).

As ``runner/drafts.py``, but requests are told apart by their rows in V2's states, and what differs from request to
request stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch

from vllm_medusa.runner.proposer import MedusaProposer
from vllm_medusa.step.plan import table_of
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.layout import KEPT_LAYOUTS, TreeLayout
from vllm_medusa.tree.rows import StepRows
from vllm_medusa.tree.static import StaticTree


class Drafts(Protocol):
    """Proposes drafts, and knows which tree each one follows."""

    def propose(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        chained: torch.Tensor | None,  # [requests], bool
        state: torch.Tensor | None,  # [requests], int
    ) -> torch.Tensor:
        """Draft each request's next tokens.

        Args:
            hidden: the target's normed hidden state at the row where each request stopped.
            chained: requests whose draft must be the chain of the heads' top-1 tokens; None if there are none.
            state: each request's row in V2's states; None in a warm-up, which leaves no trace.

        Returns:
            ``[requests, rows - 1]``, int64, in row order; -1 where there is nothing to draft.

        """

    def layout(
        self,
        state: torch.Tensor,  # [requests], int
        kinds: Sequence[int],
        num_drafts: Sequence[int],
    ) -> TreeLayout:
        """Lay out the trees of a step that verifies so many drafted rows; ``kinds`` is ``CHAIN`` or ``TREE``."""


def drafts_of(proposer: MedusaProposer, max_requests: int, device: torch.device) -> Drafts:
    """Return what suits the proposer's kind of tree."""
    tree = proposer.tree
    if isinstance(tree, DynamicTree):
        return DynamicDrafts(proposer, tree.to(device), max_requests, device)
    return StaticDrafts(proposer, tree, device)


class StaticDrafts:
    """Drafts that follow one tree, the same for every request."""

    def __init__(self, proposer: MedusaProposer, tree: StaticTree, device: torch.device) -> None:
        self._proposer = proposer
        self._table = table_of(tree.topology, device)
        drafts, top_path = len(tree) - 1, tree.top_path
        self._chain_order = torch.tensor(top_path + [0] * (drafts - len(top_path))).to(device)
        self._beyond_chain = (torch.arange(drafts) >= len(top_path)).to(device)

    def propose(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        chained: torch.Tensor | None,  # [requests], bool
        state: torch.Tensor | None,  # [requests], int
    ) -> torch.Tensor:
        """Draft each request's next tokens (see ``Drafts.propose``)."""
        drafts = self._proposer.propose(hidden)
        if chained is None:
            return drafts
        chain = drafts[:, self._chain_order].masked_fill(self._beyond_chain, -1)
        return torch.where(chained[:, None], chain, drafts)

    def layout(
        self,
        state: torch.Tensor,  # [requests], int
        kinds: Sequence[int],
        num_drafts: Sequence[int],
    ) -> TreeLayout:
        """Lay out a step's trees (see ``Drafts.layout``)."""
        return self._table.layout(kinds, num_drafts)


class DynamicDrafts:
    """Drafts that follow a tree of their own each; all have as many nodes, for the host does not know the trees."""

    def __init__(self, proposer: MedusaProposer, tree: DynamicTree, max_requests: int, device: torch.device) -> None:
        self._proposer, self._tree, self._device = proposer, tree, device
        # The scheduler makes up drafts for some new requests; any tree will do for those.
        self._candidate = torch.arange(len(tree), device=device).repeat(max_requests, 1)
        self._beyond_chain = torch.arange(len(tree) - 1, device=device) >= tree.chain_length
        self._rows = lru_cache(KEPT_LAYOUTS)(self._number)

    def propose(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        chained: torch.Tensor | None,  # [requests], bool
        state: torch.Tensor | None,  # [requests], int
    ) -> torch.Tensor:
        """Draft each request's next tokens (see ``Drafts.propose``)."""
        trees, drafts = self._proposer.propose_trees(hidden, chained)
        if state is not None:
            self._candidate[state] = trees.candidate
        if chained is None:
            return drafts
        return drafts.masked_fill(chained[:, None] & self._beyond_chain, -1)

    def layout(
        self,
        state: torch.Tensor,  # [requests], int
        kinds: Sequence[int],
        num_drafts: Sequence[int],
    ) -> TreeLayout:
        """Lay out a step's trees (see ``Drafts.layout``); a chain is the beginning of a request's own tree here."""
        stack = self._tree.stack(self._candidate[state])
        return stack.layout(self._rows(tuple(num_drafts)), min(self._tree.num_heads, max(num_drafts)))

    def _number(self, num_drafts: tuple[int, ...]) -> StepRows:
        return StepRows.of(range(len(num_drafts)), num_drafts, [1] * len(num_drafts), self._device)
