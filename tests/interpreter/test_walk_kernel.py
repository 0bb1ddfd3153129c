# SPDX-License-Identifier: Apache-2.0
"""The walk in one launch against the walk level by level."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import VOCABULARY, TokenTree, deterministic, step_of, token_trees
from vllm_medusa.acceptance.exact import walk
from vllm_medusa.acceptance.walk_kernel import walk_drawn
from vllm_medusa.tree.drafts import NO_TOKEN


@settings(deterministic, max_examples=40)
@given(st.lists(token_trees(), min_size=1, max_size=5), st.sampled_from([torch.int32, torch.int64]), st.data())
def test_the_walk_is_that_of_exact_acceptance(
    requests: list[TokenTree], dtype: torch.dtype, data: st.DataObject
) -> None:
    trees = step_of(requests)
    rows = len(trees.parents)
    tokens = st.integers(0, VOCABULARY - 1)
    drawn = torch.tensor(data.draw(st.lists(tokens, min_size=rows, max_size=rows)), dtype=dtype)
    max_rows = max(len(tree.parents) for tree in requests) + data.draw(st.integers(0, 9))
    found, expected = walk_drawn(trees, drawn, max_rows), walk(trees, lambda row, walking: drawn[row].long())
    levels = expected.rows.shape[1]
    assert found.tokens.shape == found.rows.shape == (len(requests), trees.max_depth + 1)
    assert torch.equal(found.tokens[:, :levels], expected.tokens)
    assert torch.equal(found.rows[:, :levels], expected.rows)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.stopped_at, expected.stopped_at)
    assert (found.tokens[:, levels:] == NO_TOKEN).all()
    assert (found.rows[:, levels:] == NO_TOKEN).all()


def test_a_draft_that_the_scheduler_padded_is_carried_by_no_draw() -> None:
    trees = step_of([TokenTree([-1, 0, 1], [0, -1, 1])])
    found = walk_drawn(trees, torch.tensor([1, 1, 1]), max_rows=3)
    assert found.tokens.tolist() == [[1, NO_TOKEN, NO_TOKEN]]
