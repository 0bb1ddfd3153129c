# SPDX-License-Identifier: Apache-2.0
"""Random draft trees and batches of them, and settings that make a property test the same on every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

from vllm_medusa.step.trees import WORD_BITS, StepTrees, derive_trees
from vllm_medusa.tree.topology import DraftTree

deterministic = settings(derandomize=True, deadline=None, max_examples=100)

VOCABULARY = 3
"""Small, so that a random token is often carried by a child."""


@st.composite
def trees(draw: st.DrawFn, min_rows: int = 1, max_rows: int = 16) -> DraftTree:
    """Any tree: every parent-first array of parents may come out."""
    rows = draw(st.integers(min_rows, max_rows))
    return DraftTree.from_parents([-1, *(draw(st.integers(0, row - 1)) for row in range(1, rows))])


@dataclass(frozen=True)
class TokenTree:
    """A tree with tokens, as plain Python; siblings carry different tokens."""

    parents: list[int]
    tokens: list[int]

    def child(self, row: int, token: int) -> int | None:
        """Return the child of ``row`` that carries the token, if there is one."""
        edges = list(zip(self.parents, self.tokens, strict=True))
        return edges.index((row, token)) if (row, token) in edges else None


@st.composite
def token_trees(draw: st.DrawFn, max_rows: int = 12) -> TokenTree:
    edges = draw(
        st.lists(
            st.tuples(st.integers(0, max_rows - 1), st.integers(0, VOCABULARY - 1)),
            unique=True,
            max_size=max_rows - 1,
        )
    )
    tree = TokenTree([-1], [0])
    for parent, token in edges:
        if tree.child(parent % len(tree.parents), token) is None:
            tree.parents.append(parent % len(tree.parents))
            tree.tokens.append(token)
    return tree


def path_to(tree: DraftTree, row: int) -> list[int]:
    """The rows from the root to ``row``, both included, read off the parents one by one."""
    rows = [row]
    while rows[0] != 0:
        rows.insert(0, int(tree.parents[rows[0]]))
    return rows


def bitmasks_of(tree: DraftTree) -> torch.Tensor:
    """``StepTrees.ancestor_bits`` of a tree's rows, bit by bit."""
    words = torch.zeros(len(tree), -(-len(tree) // WORD_BITS), dtype=torch.int64)
    for row in range(len(tree)):
        for above in path_to(tree, row):
            words[row, above // WORD_BITS] += 1 << above % WORD_BITS
    return words


def step_of(requests: list[TokenTree]) -> StepTrees:
    """Lay the trees side by side, as a step whose tokens are all rows; attention's part is left empty."""
    parents, tokens, first = [], [], [0]
    for tree in requests:
        parents += [-1 if above < 0 else first[-1] + above for above in tree.parents]
        tokens += tree.tokens
        first.append(len(parents))
    return StepTrees(
        cu_num_rows=torch.tensor(first),
        logits_indices=torch.arange(len(parents)),
        tokens=torch.tensor(tokens),
        parents=torch.tensor(parents),
        positions=torch.empty(0),
        root_positions=torch.empty(0),
        depths=torch.empty(0),
        ancestor_bits=torch.empty(0, 1),
        max_depth=max(DraftTree.from_parents(tree.parents).depth for tree in requests),
        num_drafting_reqs=len(requests),
    )


@dataclass(frozen=True)
class StepRequest:
    """One request of a step: tokens that are computed without a tree, then the rows of a prefix of a draft's tree."""

    tree: DraftTree
    num_rows: int
    num_before: int
    cached: int

    @property
    def context(self) -> int:
        """Tokens before the root."""
        return self.cached + self.num_before

    @property
    def num_tokens(self) -> int:
        return self.num_before + self.num_rows

    @property
    def verified(self) -> DraftTree:
        return self.tree.prefix(self.num_rows)

    @property
    def branches(self) -> bool:
        return any(parent != row - 1 for row, parent in enumerate(self.verified.parents.tolist()))


@dataclass(frozen=True)
class Step:
    """A step as vLLM prepares it: every draft at the positions of a chain."""

    requests: list[StepRequest]

    @property
    def num_nodes(self) -> int:
        return max(1, *(len(request.tree) - 1 for request in self.requests))

    @property
    def draft_parents(self) -> torch.Tensor:
        """``Drafts.parents``; what comes after a tree's end is its last row's child."""
        rows = [
            request.tree.parents.tolist() + list(range(len(request.tree) - 1, self.num_nodes))
            for request in self.requests
        ]
        return torch.tensor(rows)[:, 1:]

    @property
    def cu_num_rows(self) -> torch.Tensor:
        return torch.tensor([0, *(request.num_rows for request in self.requests)]).cumsum(0)

    @property
    def query_start_loc(self) -> torch.Tensor:
        return torch.tensor([0, *(request.num_tokens for request in self.requests)]).cumsum(0)

    def tokens_of(self, index: int) -> list[int]:
        """The indices, among the step's tokens, of the rows of a request."""
        end = int(self.query_start_loc[index + 1])
        return list(range(end - self.requests[index].num_rows, end))

    @property
    def logits_indices(self) -> torch.Tensor:
        return torch.tensor([token for index in range(len(self.requests)) for token in self.tokens_of(index)])

    @property
    def seq_lens(self) -> torch.Tensor:
        return torch.tensor([request.context + request.num_rows for request in self.requests])

    @property
    def positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(each.cached, each.cached + each.num_tokens) for each in self.requests])

    @property
    def input_ids(self) -> torch.Tensor:
        return torch.arange(int(self.query_start_loc[-1]), dtype=torch.int32) * 7 + 3

    @property
    def max_depth(self) -> int:
        return max(request.verified.depth for request in self.requests)

    @property
    def num_drafting_reqs(self) -> int:
        return max((index + 1 for index, each in enumerate(self.requests) if each.num_rows > 1), default=0)

    def derive(self, input_ids: torch.Tensor | None = None, positions: torch.Tensor | None = None) -> StepTrees:
        return derive_trees(
            self.draft_parents,
            self.cu_num_rows,
            self.logits_indices,
            self.input_ids if input_ids is None else input_ids,
            self.positions if positions is None else positions,
            self.max_depth,
            self.num_drafting_reqs,
        )


@st.composite
def steps(draw: st.DrawFn, max_rows: int = 16) -> Step:
    """Steps of prompts and of drafts that the scheduler has cut; only a request without a draft has other tokens."""
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        tree = draw(trees(max_rows=max_rows))
        num_rows = draw(st.integers(1, len(tree)))
        num_before = draw(st.integers(0, 4)) if num_rows == 1 else 0
        requests.append(StepRequest(tree, num_rows, num_before, cached=draw(st.integers(0, 40))))
    return Step(requests)
