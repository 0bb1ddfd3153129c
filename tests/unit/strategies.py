"""Random draft trees and batches of them, and settings that make a property test the same on every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

from vllm_medusa.tree.batch import TreeBatch
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


def batch_of(requests: list[TokenTree]) -> TreeBatch:
    """Lay the trees side by side."""
    request, parent, token, root = [], [], [], []
    for index, tree in enumerate(requests):
        first = len(parent)
        root.append(first)
        request += [index] * len(tree.parents)
        parent += [-1 if above < 0 else first + above for above in tree.parents]
        token += tree.tokens
    max_depth = max(DraftTree.from_parents(tree.parents).depth for tree in requests)
    flat = (torch.tensor(column, dtype=torch.int64) for column in (request, parent, token, root))
    return TreeBatch(*flat, max_depth=max_depth)
