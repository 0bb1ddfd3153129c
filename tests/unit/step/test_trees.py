# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import Step, StepRequest, deterministic, path_to, steps, trees
from vllm_medusa.step.trees import CAUSAL, WORD_BITS, StepTrees
from vllm_medusa.tree.topology import DraftTree

WIDE = {"min_rows": 2 * WORD_BITS + 1, "max_rows": 2 * WORD_BITS + 40}


def bits_of(words: list[int]) -> list[int]:
    return [WORD_BITS * index + bit for index, word in enumerate(words) for bit in range(WORD_BITS) if word >> bit & 1]


def alone(tree: DraftTree) -> StepTrees:
    return Step([StepRequest(tree, len(tree), 0, 5)]).derive()


@deterministic
@given(steps())
def test_rows_lie_request_by_request_with_the_parents_and_depths_of_their_tree(step: Step) -> None:
    found = step.derive()
    row = 0
    for index, request in enumerate(step.requests):
        first = row
        assert found.roots[index] == first
        assert found.root_positions[index] == request.context
        for local, token in enumerate(step.tokens_of(index)):
            parent = int(request.tree.parents[local])
            assert found.parents[row] == (first + parent if local else -1)
            assert found.tokens[row] == step.input_ids[token]
            assert found.logits_indices[row] == token
            assert found.depths[token] == len(path_to(request.tree, local)) - 1
            assert found.positions[row] == request.context + found.depths[token]
            row += 1
    assert len(found.parents) == len(found.tokens) == found.cu_num_rows[-1] == row


@deterministic
@given(steps())
def test_the_bitmask_of_a_row_holds_its_path_and_prompts_are_causal(step: Step) -> None:
    words = step.derive().ancestor_bits
    for index, request in enumerate(step.requests):
        for local, token in enumerate(step.tokens_of(index)):
            assert bits_of(words[token].tolist()) == path_to(request.tree, local)
        first = int(step.query_start_loc[index])
        assert (words[first : first + request.num_before, 0] == CAUSAL).all()


@deterministic
@given(trees() | trees(min_rows=WORD_BITS - 1, max_rows=WORD_BITS + 3) | trees(**WIDE))
def test_bitmasks_hold_bit_j_exactly_where_row_j_is_an_ancestor(tree: DraftTree) -> None:
    words = alone(tree).ancestor_bits
    assert words.shape == (len(tree), -(-len(tree) // WORD_BITS))
    assert words.dtype == torch.int64
    assert (words >= 0).all()
    assert [bits_of(row) for row in words.tolist()] == [path_to(tree, row) for row in range(len(tree))]


@deterministic
@given(steps())
def test_the_requests_that_branch_are_those_whose_verified_rows_are_no_chain(step: Step) -> None:
    expected = [index for index, request in enumerate(step.requests) if request.branches]
    assert step.derive().branching_reqs().tolist() == expected


@deterministic
@given(st.integers(0, 12))
def test_a_chain_branches_nowhere(depth: int) -> None:
    assert alone(DraftTree.chain(depth)).branching_reqs().tolist() == []


@deterministic
@given(steps())
def test_rows_are_placed_at_the_position_of_their_depth_and_other_tokens_stay(step: Step) -> None:
    expected, placed = step.positions, step.positions
    step.derive(positions=placed)
    for index, request in enumerate(step.requests):
        for local, token in enumerate(step.tokens_of(index)):
            expected[token] = request.context + len(path_to(request.tree, local)) - 1
    assert torch.equal(placed, expected)


@deterministic
@given(steps(), st.data())
def test_padded_drafts_get_an_embedding_and_keep_their_mark(step: Step, data: st.DataObject) -> None:
    ids = step.input_ids
    padded = data.draw(st.lists(st.sampled_from(step.logits_indices.tolist()), unique=True))
    ids[padded] = -1
    expected = ids.clone()
    found = step.derive(input_ids=ids)
    assert torch.equal(found.tokens, expected[step.logits_indices].long())
    assert torch.equal(ids, expected.clamp(min=0))
