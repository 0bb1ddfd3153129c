"""The trees that requests' drafts follow, from the step that proposes them to the one that verifies them (V1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import torch

from vllm_medusa.runner.proposer import MedusaProposer
from vllm_medusa.step.plan import CHAIN, TREE, table_of
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.layout import KEPT_LAYOUTS, TreeLayout
from vllm_medusa.tree.rows import StepRows
from vllm_medusa.tree.static import StaticTree


class Drafts(Protocol):
    """Proposes drafts, and knows which tree each one follows.

    Requests are told apart by their ids. ``chained`` says of each request whether its draft must be the chain of the
    heads' top-1 tokens.
    """

    def propose(
        self,
        requests: Sequence[str],
        chained: Sequence[bool],
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> list[list[int]]:
        """Draft each request's next tokens, in row order, from the hidden state where it stopped."""

    def layout(self, requests: Sequence[str], chained: Sequence[bool], num_drafts: Sequence[int]) -> TreeLayout:
        """Lay out the trees of a step that verifies so many of each request's drafted rows."""

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what is known of requests that have ended."""


def drafts_of(proposer: MedusaProposer) -> Drafts:
    """Return what suits the proposer's kind of tree."""
    tree = proposer.tree
    return DynamicDrafts(proposer, tree) if isinstance(tree, DynamicTree) else StaticDrafts(proposer, tree)


class StaticDrafts:
    """Drafts that follow one tree, the same for every request."""

    def __init__(self, proposer: MedusaProposer, tree: StaticTree) -> None:
        self._proposer = proposer
        self._table = table_of(tree.topology)
        self._top_path = tree.top_path

    def propose(
        self,
        requests: Sequence[str],
        chained: Sequence[bool],
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> list[list[int]]:
        """Draft each request's next tokens (see ``Drafts.propose``)."""
        drafts: list[list[int]] = self._proposer.propose(hidden).tolist()
        for index, is_chain in enumerate(chained):
            if is_chain:
                drafts[index] = [drafts[index][row] for row in self._top_path]
        return drafts

    def layout(self, requests: Sequence[str], chained: Sequence[bool], num_drafts: Sequence[int]) -> TreeLayout:
        """Lay out a step's trees (see ``Drafts.layout``)."""
        return self._table.layout([CHAIN if is_chain else TREE for is_chain in chained], num_drafts)

    def forget(self, requests: Iterable[str]) -> None:
        """Nothing is known of single requests."""


class DynamicDrafts:
    """Drafts that follow a tree of their own each."""

    def __init__(self, proposer: MedusaProposer, tree: DynamicTree) -> None:
        self._proposer, self._tree = proposer, tree
        self._candidate: dict[str, tuple[int, ...]] = {}
        # The scheduler makes up drafts for some new requests; any tree will do for those.
        self._any = tuple(range(len(tree)))
        self._kept = lru_cache(KEPT_LAYOUTS)(self._layout)

    def propose(
        self,
        requests: Sequence[str],
        chained: Sequence[bool],
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> list[list[int]]:
        """Draft each request's next tokens (see ``Drafts.propose``)."""
        trees, tokens = self._proposer.propose_trees(hidden, torch.tensor(chained) if any(chained) else None)
        self._candidate.update(zip(requests, map(tuple, trees.candidate.tolist()), strict=True))
        return [draft[: rows - 1] for draft, rows in zip(tokens.tolist(), trees.length.tolist(), strict=True)]

    def layout(self, requests: Sequence[str], chained: Sequence[bool], num_drafts: Sequence[int]) -> TreeLayout:
        """Lay out a step's trees (see ``Drafts.layout``)."""
        candidates = tuple(self._candidate.get(request, self._any) for request in requests)
        if len(requests) > 1:
            return self._layout(candidates, tuple(num_drafts))
        # One request's trees repeat; those of many, together, do not.
        return self._kept((candidates[0][: num_drafts[0] + 1],), tuple(num_drafts))

    def forget(self, requests: Iterable[str]) -> None:
        """Drop the trees of requests that have ended."""
        for request in requests:
            self._candidate.pop(request, None)

    def _layout(self, candidates: tuple[tuple[int, ...], ...], num_drafts: tuple[int, ...]) -> TreeLayout:
        stack = self._tree.stack(torch.tensor(candidates))
        rows = StepRows.of(range(len(num_drafts)), num_drafts, stack.chain_rows.tolist())
        return stack.layout(rows, min(self._tree.num_heads, max(num_drafts)))
