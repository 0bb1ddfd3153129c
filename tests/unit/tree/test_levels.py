# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from tests.unit.tree.test_static import path_sets
from vllm_medusa.tree.levels import Asked
from vllm_medusa.tree.static import chain, from_choices

RANKS = 10


class RankHeads:
    """Heads whose tokens spell the path: a child's token is its parent's times ``RANKS``, plus its rank."""

    def top_tokens(self, asked: Asked, top_k: int) -> torch.Tensor:
        return asked.tokens[..., None] * RANKS + torch.arange(top_k)


def spelled(choice: list[int], root: int) -> int:
    token = root
    for rank in choice:
        token = token * RANKS + rank
    return token


@deterministic
@given(choices=path_sets(), roots=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_each_node_carries_the_token_of_its_own_path(choices: list[list[int]], roots: list[int]) -> None:
    tree = from_choices(choices)

    drafts = tree.to(torch.device("cpu")).draft_by_level(RankHeads(), torch.tensor(roots))

    assert drafts.tokens.tolist() == [[spelled(choice, root) for choice in tree.choices] for root in roots]
    assert drafts.parents.tolist() == [tree.topology.parents[1:].tolist()] * len(roots)


def test_a_chain_asks_for_one_node_after_another() -> None:
    assert chain(3).draft_by_level(RankHeads(), torch.tensor([7])).tokens.tolist() == [[70, 700, 7000]]
