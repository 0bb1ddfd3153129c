# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.drafts import NO_TOKEN, Drafts
from vllm_medusa.tree.static import StaticTree, cartesian, chain, from_choices

HEADS, TOP_K = 3, 4
TREES = [
    chain(3),
    cartesian([3, 2, 1]),
    cartesian([4, 4, 4]),
    from_choices([[1], [1, 0], [0]]),
    from_choices([[2], [1]]),
]
PREDICTIONS = torch.arange(5 * HEADS * TOP_K).view(5, HEADS, TOP_K)
"""Tokens that tell their request, head and rank."""


@deterministic
@given(st.sampled_from(TREES))
def test_a_static_tree_drafts_the_token_of_each_nodes_head_and_rank(tree: StaticTree) -> None:
    drafts = tree.draft(PREDICTIONS)
    for own, tokens, parents, length in zip(
        PREDICTIONS, drafts.tokens.tolist(), drafts.parents.tolist(), drafts.lengths.tolist(), strict=True
    ):
        assert tokens == [own[len(path) - 1, path[-1]] for path in tree.choices]
        assert parents == tree.topology.parents[1:].tolist()
        assert length == tree.num_nodes


def test_tokens_past_a_drafts_length_are_padding() -> None:
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    drafts = Drafts(tokens, torch.zeros_like(tokens), torch.tensor([3, 1]))
    assert drafts.padded_tokens().tolist() == [[5, 6, 7], [8, NO_TOKEN, NO_TOKEN]]
