# SPDX-License-Identifier: Apache-2.0
"""A step's trees in one launch against those derived by pointer jumping."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import Step, StepRequest, deterministic, steps
from vllm_medusa.step.derive_kernel import derive_trees_on_device
from vllm_medusa.step.trees import CAUSAL, StepTrees
from vllm_medusa.tree.topology import DraftTree


def check(step: Step, seed: int = 0) -> None:
    """Derive a step's trees both ways, in states and buffers that hold others, and compare all that is defined."""
    num_reqs, generator = len(step.requests), torch.Generator().manual_seed(seed)
    states = torch.randperm(num_reqs + 3, generator=generator)[:num_reqs]
    parents = torch.zeros(num_reqs + 3, step.num_nodes, dtype=torch.int64)
    parents[states] = step.draft_parents
    ids = torch.where(torch.rand(len(step.input_ids), generator=generator) < 0.2, -1, step.input_ids)
    expected_ids, expected_positions = ids.clone(), step.positions
    expected = step.derive(expected_ids, expected_positions)
    positions, num_tokens = step.positions, len(ids)
    buffers = StepTrees.allocate(step.num_nodes, num_reqs, num_tokens + 2, torch.device("cpu"))
    for buffer in (buffers.tokens, buffers.parents, buffers.positions, buffers.root_positions, buffers.depths):
        buffer.random_(generator=generator)
    found = derive_trees_on_device(
        parents,
        states,
        step.query_start_loc.int(),
        step.cu_num_rows.int(),
        step.logits_indices,
        ids,
        positions,
        step.max_depth,
        step.num_drafting_reqs,
        buffers,
    )
    rows = step.logits_indices
    first = step.query_start_loc[:-1]
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.parents, expected.parents)
    assert torch.equal(found.roots.long(), expected.roots)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.root_positions[:num_reqs], expected.root_positions)
    assert torch.equal(found.depths[rows], expected.depths[rows])
    assert torch.equal(found.ancestor_bits[rows], expected.ancestor_bits[rows])
    assert torch.equal(found.ancestor_bits[first], expected.ancestor_bits[first])
    assert (found.ancestor_bits[num_tokens:] == CAUSAL).all()
    assert torch.equal(positions, expected_positions)
    assert torch.equal(ids[rows], expected_ids[rows])
    assert (found.max_depth, found.num_drafting_reqs) == (expected.max_depth, expected.num_drafting_reqs)


@settings(deterministic, max_examples=40)
@given(steps(), st.integers(0, 99))
def test_the_trees_are_those_that_pointer_jumping_derives(step: Step, seed: int) -> None:
    check(step, seed)


@settings(deterministic, max_examples=5)
@given(steps(max_rows=140), st.integers(0, 99))
def test_trees_of_several_words_are_those_that_pointer_jumping_derives(step: Step, seed: int) -> None:
    check(step, seed)


def test_a_deep_chain_beside_a_request_without_a_draft() -> None:
    check(Step([StepRequest(DraftTree.chain(70), 71, 0, 9), StepRequest(DraftTree.chain(70), 1, 3, 2)]))
