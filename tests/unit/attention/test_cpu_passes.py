# SPDX-License-Identifier: Apache-2.0
"""Which requests of a step each way to attend for trees takes, and which way an engine takes."""

from __future__ import annotations

import pytest
from vllm.v1.attention.backends import cpu_attn

from tests.unit.attention.cpu_steps import BRANCHING, Layer, Request, Step, assert_same
from vllm_medusa.attention.cpu.backend import TreeCPUAttentionMetadata
from vllm_medusa.tree.topology import DraftTree


def test_a_step_without_branching_trees_is_left_to_the_stock_op() -> None:
    step = Step(Layer(), [Request(40, DraftTree.chain(4)), Request(0, None, chunk=9)])
    assert isinstance(step.metadata(), cpu_attn.CPUAttentionMetadata)
    step = Step(Layer(), [Request(40, DraftTree.chain(4)), Request(7, BRANCHING)])
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert metadata.native is not None
    assert metadata.native.token_indices.tolist() == list(range(5))
    assert metadata.trees.context.tolist() == [7]


def test_trees_that_are_alone_in_a_step_need_no_stock_metadata() -> None:
    step = Step(Layer(), [Request(40, BRANCHING), Request(7, BRANCHING)])
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert metadata.native is None
    assert metadata.trees.in_order
    assert_same(step, step.attend(), step.by_reference())


@pytest.mark.parametrize("other", [Request(7, BRANCHING.prefix(4)), Request(7, DraftTree.chain(4))])
def test_rows_are_not_taken_in_order_where_trees_are_padded_or_not_alone(other: Request) -> None:
    step = Step(Layer(), [Request(40, BRANCHING), other])
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert not metadata.trees.in_order
    assert_same(step, step.attend(), step.by_reference())
