# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import VOCABULARY, Step, StepRequest, TokenTree, deterministic, step_of, token_trees
from vllm_medusa.acceptance.exact import Walk, walk
from vllm_medusa.kv_cache.backend_commit import misplaced_rows
from vllm_medusa.tree.topology import DraftTree


@deterministic
@given(st.lists(token_trees(), min_size=1, max_size=5), st.data())
def test_accepted_rows_move_to_where_a_sequence_has_them(requests: list[TokenTree], data: st.DataObject) -> None:
    trees = step_of(requests)
    draws = [
        torch.tensor([data.draw(st.integers(0, VOCABULARY - 1)) for _ in requests]) for _ in range(trees.max_depth + 1)
    ]
    accepted = walk(trees, lambda row, walking: draws.pop(0))
    source, destination = misplaced_rows(trees, accepted)
    cache = torch.arange(len(trees.parents))  # the row whose keys each slot holds
    cache[destination] = cache[source]
    for index, root in enumerate(trees.roots.tolist()):
        path = [row for row in accepted.rows[index].tolist() if row >= 0]
        assert cache[root : root + len(path)].tolist() == path
    assert not (source == destination).any()
    assert len(set(destination.tolist())) == len(destination)


@deterministic
@given(st.integers(1, 4), st.integers(0, 6))
def test_an_accepted_chain_moves_nothing(requests: int, depth: int) -> None:
    trees = Step([StepRequest(DraftTree.chain(depth), depth + 1, 0, 5)] * requests).derive()
    rows = trees.roots[:, None] + torch.arange(depth + 1)
    assert [len(moves) for moves in misplaced_rows(trees, Walk.along(trees, rows, rows))] == [0, 0]
