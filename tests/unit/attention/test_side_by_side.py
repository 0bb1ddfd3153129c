# SPDX-License-Identifier: Apache-2.0
"""The branching trees of a step as the CPU's attention takes them: side by side, padded at the end."""

from __future__ import annotations

import torch
from hypothesis import given

from tests.unit.strategies import Step, deterministic, path_to, steps
from vllm_medusa.attention.cpu.padded import side_by_side


@deterministic
@given(steps())
def test_a_row_attends_to_its_path_and_has_the_depth_of_its_path(step: Step) -> None:
    trees = step.derive()
    branching = trees.branching_reqs()
    if not len(branching):
        return
    token, ancestors = side_by_side(trees, branching)
    for place, index in enumerate(branching.tolist()):
        request = step.requests[index]
        assert token[place, : request.num_rows].tolist() == step.tokens_of(index)
        for row in range(request.num_rows):
            assert ancestors[place, row].nonzero().flatten().tolist() == path_to(request.tree, row)
            assert trees.depths[token[place, row]] == len(path_to(request.tree, row)) - 1


@deterministic
@given(steps())
def test_padding_repeats_the_last_row_and_no_row_sees_padding(step: Step) -> None:
    trees = step.derive()
    branching = trees.branching_reqs()
    if not len(branching):
        return
    token, ancestors = side_by_side(trees, branching)
    widest = max(step.requests[index].num_rows for index in branching.tolist())
    assert token.shape[1] == widest
    for place, index in enumerate(branching.tolist()):
        last = step.requests[index].num_rows - 1
        for padding in range(last + 1, widest):
            assert token[place, padding] == token[place, last]
            assert torch.equal(ancestors[place, padding], ancestors[place, last])
            assert not ancestors[place, :, padding].any()
