# SPDX-License-Identifier: Apache-2.0
"""The fused op's own ways: work cut among threads, rows in place, nothing read that is not a key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.attention.cpu_steps import BRANCHING, Layer, Request, Step, assert_same, common_metadata
from tests.unit.strategies import deterministic, trees
from vllm_medusa.attention.cpu.backend import TreeCPUAttentionMetadata, TreeCPUAttentionMetadataBuilder
from vllm_medusa.attention.cpu.build import load_library
from vllm_medusa.attention.cpu.fused import FusedTrees
from vllm_medusa.tree.static import cartesian
from vllm_medusa.tree.topology import DraftTree

WIDE = cartesian([4, 4, 4]).topology


@pytest.fixture(autouse=True, scope="module")
def fused() -> Iterator[None]:
    load_library()
    with mock.patch.object(TreeCPUAttentionMetadataBuilder, "tree_pass", FusedTrees):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3, 7, 16])
@pytest.mark.parametrize(
    "layer",
    [Layer(), Layer(kv_heads=1, group=3, sinks=True, alibi=True), Layer(kv_heads=3, window=50, block_size=128)],
    ids=["plain", "sinks and alibi", "window"],
)
def test_work_that_is_cut_among_threads_gives_what_one_thread_gives(threads: None, layer: Layer, count: int) -> None:
    for batch in ([Request(300, BRANCHING)], [Request(9, WIDE), Request(500, BRANCHING), Request(0, BRANCHING)]):
        step = Step(layer, batch)
        torch.set_num_threads(1)
        alone = step.attend()
        torch.set_num_threads(count)
        assert_same(step, step.attend(), alone)


@settings(deterministic, max_examples=25)
@given(st.integers(1, 9), st.lists(st.builds(Request, st.integers(0, 400), trees(max_rows=40)), min_size=1, max_size=4))
def test_any_cut_attends_as_in_the_dense_reference(count: int, batch: list[Request]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        step = Step(Layer(kv_heads=3), [*batch, Request(5, BRANCHING)])
        assert_same(step, step.attend(), step.by_reference())
    finally:
        torch.set_num_threads(before)


def test_on_one_thread_a_trees_output_is_the_same_to_the_bit_whatever_else_is_in_the_step(threads: None) -> None:
    torch.set_num_threads(1)
    alone = Step(Layer(), [Request(140, BRANCHING)])
    together = Step(Layer(), [Request(140, BRANCHING), Request(9, WIDE), Request(70, DraftTree.chain(4))])
    for name in ("query", "key", "value"):
        getattr(together, name)[: len(BRANCHING)] = getattr(alone, name)
    together.write(*alone.contexts[0], together.slots(0, 0, 140))
    assert torch.equal(together.attend()[: len(BRANCHING)], alone.attend())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [{}, {"soft_cap": 3.0}, {"alibi": True, "sinks": True}, {"window": 20}], ids=str)
def test_slots_that_hold_no_key_are_not_read(layer: dict[str, object], dtype: torch.dtype) -> None:
    step = Step(Layer(dtype=dtype, **layer), [Request(45, BRANCHING), Request(3, WIDE)])
    step.cache.fill_(float("nan"))
    for index, (key, value) in enumerate(step.contexts):
        step.write(key, value, step.slots(index, 0, len(key)))
    assert step.attend().isfinite().all()


def test_rows_are_read_and_written_where_they_lie_in_larger_tensors() -> None:
    step = Step(Layer(), [Request(45, BRANCHING)])
    expected = step.attend()
    tokens, heads, head_dim = step.query.shape
    query = torch.randn(tokens, heads + 4, head_dim)
    query[:, :heads] = step.query
    output = torch.full((tokens + 3, heads, head_dim), 7.0)
    arguments = (step.key, step.value, step.cache, step.metadata(), output)
    step.impl.forward(step.module, query[:, :heads], *arguments)
    assert torch.equal(output[:tokens], expected)
    assert (output[tokens:] == 7).all()


def test_in_a_step_with_a_branch_only_prompts_are_left_to_the_stock_op() -> None:
    batch = [Request(40, DraftTree.chain(4)), Request(8, None, chunk=17), Request(7, BRANCHING), Request(30, None)]
    step = Step(Layer(), batch)
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert isinstance(metadata.trees, FusedTrees)
    assert metadata.trees.context.tolist() == [40, 7, 30]
    assert metadata.trees.num_rows.tolist() == [5, len(BRANCHING), 1]
    assert metadata.native is not None
    assert metadata.native.token_indices.tolist() == list(range(5, 5 + 17))
    assert_same(step, step.attend(), step.by_reference())


def test_indices_may_have_32_bits_as_in_v2() -> None:
    step = Step(Layer(), [Request(45, BRANCHING), Request(3, WIDE)])
    expected = step.attend()
    trees = step.builder.trees
    common = common_metadata(step.start, step.seq_lens, step.block_table, torch.zeros(0))
    narrow = replace(trees, cu_num_rows=trees.cu_num_rows.int(), logits_indices=trees.logits_indices.int())
    output = torch.empty_like(step.query)
    passed = FusedTrees.of(narrow, common, FusedTrees.takes(narrow, common), step.layer.block_size)
    passed.attend(step.impl, step.query, step.cache, output)
    assert torch.equal(output, expected)


def test_a_cache_of_another_dtype_is_refused_rather_than_misread() -> None:
    step = Step(Layer(), [Request(45, BRANCHING)])
    step.attend()
    query = step.query.bfloat16()
    arguments = (step.key, step.value, step.cache, step.metadata(), torch.empty_like(query))
    with pytest.raises(RuntimeError):
        step.impl.forward(step.module, query, *arguments)
