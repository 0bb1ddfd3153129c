# SPDX-License-Identifier: Apache-2.0
"""The tree attention for CPUs, each way, against the dense reference and against vLLM's own op on each row's path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backends import cpu_attn

from tests.unit.attention.cpu_steps import BRANCHING, TOLERANCE, Layer, Request, Step, assert_same
from tests.unit.strategies import deterministic, path_to, trees
from vllm_medusa.attention.cpu.backend import TreeCPUAttentionMetadataBuilder
from vllm_medusa.attention.cpu.build import load_library
from vllm_medusa.attention.cpu.fused import FusedTrees
from vllm_medusa.attention.cpu.padded import PaddedTrees
from vllm_medusa.tree.static import cartesian

some = settings(deterministic, max_examples=50)
few = settings(deterministic, max_examples=15)


@pytest.fixture(params=[PaddedTrees, FusedTrees], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attend for trees by torch calls and by the fused op."""
    if request.param is FusedTrees:
        load_library()
    with mock.patch.object(TreeCPUAttentionMetadataBuilder, "tree_pass", request.param):
        yield


contexts = st.integers(0, 80)
requests = st.builds(Request, contexts, trees(max_rows=12)) | st.builds(
    Request, contexts, st.none(), chunk=st.integers(1, 40)
)
batches = st.lists(requests, min_size=1, max_size=5)
seeds = st.integers(0, 9)
windows = st.none() | st.integers(1, 40)
soft_caps = st.none() | st.floats(0.5, 5)


@some
@given(
    st.builds(
        Layer,
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        head_dim=st.sampled_from([32, 64, 80]),
        block_size=st.sampled_from([16, 32, 48, 128]),
        soft_cap=soft_caps,
        window=windows,
    ),
    batches,
    seeds,
)
def test_every_row_of_a_mixed_step_attends_as_in_the_dense_reference(
    layer: Layer, batch: list[Request], seed: int
) -> None:
    step = Step(layer, batch, seed)
    assert_same(step, step.attend(), step.by_reference())


@some
@given(
    st.builds(
        Layer,
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 2, 4]),
        soft_cap=soft_caps,
        window=windows,
        alibi=st.booleans(),
        sinks=st.booleans(),
    ),
    batches,
    seeds,
)
def test_every_row_of_a_mixed_step_attends_as_the_stock_op_does_on_its_path(
    layer: Layer, batch: list[Request], seed: int
) -> None:
    step = Step(layer, batch, seed)
    assert_same(step, step.attend(), step.by_stock_op_on_paths())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@few
@given(
    st.builds(Layer, kv_heads=st.integers(1, 2), window=windows, soft_cap=soft_caps, sinks=st.booleans()),
    batches,
    seeds,
)
def test_half_precision_attends_as_the_stock_op_does_up_to_its_rounding(
    dtype: torch.dtype, layer: Layer, batch: list[Request], seed: int
) -> None:
    step = Step(replace(layer, dtype=dtype), batch, seed)
    assert_same(step, step.attend(), step.by_stock_op_on_paths())


def test_trees_of_more_than_64_rows_attend_as_in_the_dense_reference() -> None:
    wide = cartesian([4, 4, 4, 2]).topology
    assert len(wide) > 2 * 64
    batch = [Request(70, wide), Request(3, BRANCHING), Request(33, None, chunk=17), Request(40, wide.prefix(97))]
    for layer in (Layer(), Layer(kv_heads=1, group=4, window=35, head_dim=64)):
        step = Step(layer, batch)
        assert_same(step, step.attend(), step.by_reference())


@pytest.mark.parametrize("context", [1, 31, 32, 33, 63, 64])
def test_a_context_that_ends_at_a_blocks_edge_is_read_whole_and_no_further(context: int) -> None:
    step = Step(Layer(), [Request(context, BRANCHING)])
    assert_same(step, step.attend(), step.by_reference())


def test_a_tree_on_a_prompt_of_one_token_has_no_context_and_attends_to_itself() -> None:
    step = Step(Layer(sinks=True), [Request(0, BRANCHING), Request(0, BRANCHING.prefix(4))])
    assert_same(step, step.attend(), step.by_stock_op_on_paths())


def test_a_padding_row_does_not_touch_another_requests_output() -> None:
    alone = Step(Layer(), [Request(40, BRANCHING)])
    together = Step(Layer(), [Request(40, BRANCHING), Request(9, cartesian([5, 3]).topology)])
    for name in ("query", "key", "value"):
        getattr(together, name)[: len(BRANCHING)] = getattr(alone, name)
    key, value = alone.contexts[0]
    together.write(key, value, together.slots(0, 0, 40))
    assert_same(alone, together.attend()[: len(BRANCHING)], alone.attend())


@pytest.mark.parametrize("isa", ["neon", "rvv", "vxe", "vsx"])
def test_a_cache_layout_that_cannot_be_read_is_refused_by_name(isa: str) -> None:
    with mock.patch.object(cpu_attn, "_get_attn_isa", return_value=isa), pytest.raises(ValueError) as error:
        Layer().builder()
    assert f"'{isa}'" in str(error.value)
    assert 'give medusa_tree "chain"' in str(error.value)
    assert "\n" not in str(error.value)


def test_tiles_of_matrix_units_give_way_to_the_layout_that_can_be_read() -> None:
    with mock.patch.object(cpu_attn, "_get_attn_isa", return_value="amx"):
        assert Layer().builder().isa == "vec"


def stored(step: Step, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read keys and values back, in the layout that the module documents."""
    blocks, kv_heads, _, width = step.cache.shape
    keys, values = step.cache.view(blocks, kv_heads, 2 * step.layer.block_size, width // 2).chunk(2, dim=2)
    keys = keys.reshape(blocks, kv_heads, width // 2, step.layer.block_size)
    block, offset = slots // step.layer.block_size, slots % step.layer.block_size
    return keys[block, :, :, offset], values[block, :, offset]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@few
@given(st.integers(1, 3), st.data())
def test_moved_rows_arrive_as_they_were_and_no_other_slot_changes(
    dtype: torch.dtype, kv_heads: int, data: st.DataObject
) -> None:
    step = Step(Layer(kv_heads, dtype=dtype), [Request(70, BRANCHING)])
    everywhere = torch.arange(step.cache.shape[0] * step.layer.block_size)
    count = data.draw(st.integers(0, 12))
    slots = st.integers(0, len(everywhere) - 1)
    # Any sources, so one may be another's target: all are read before any is written.
    source = torch.tensor(data.draw(st.lists(slots, min_size=count, max_size=count)), dtype=torch.int64)
    target = torch.tensor(data.draw(st.lists(slots, min_size=count, max_size=count, unique=True)), dtype=torch.int64)
    before = [part.clone() for part in stored(step, everywhere)]
    step.impl.move_kv(step.module, step.cache, source, target)
    for old, new in zip(before, stored(step, everywhere), strict=True):
        expected = old.clone()
        expected[target] = old[source]
        assert torch.equal(new, expected)


def test_a_chain_of_moves_shifts_every_row_by_one() -> None:
    step = Step(Layer(), [Request(70, None, chunk=1)])
    slots = step.slots(0, 28, 36)  # across the edge of a block
    key, value = step.contexts[0]
    step.impl.move_kv(step.module, step.cache, slots[1:], slots[:-1])
    moved_key, moved_value = stored(step, slots)
    assert torch.equal(moved_key[:-1], key[29:36])
    assert torch.equal(moved_value[:-1], value[29:36])
    assert torch.equal(moved_key[-1], key[35])


def test_attention_after_a_move_is_attention_over_the_accepted_path() -> None:
    """Accepting rows 2 and 5 of the tree, then decoding, equals decoding on a sequence that was never drafted."""
    step = Step(Layer(alibi=True), [Request(30, BRANCHING)])
    step.attend()
    slots, path = step.slots(0, 30, 30 + len(BRANCHING)), path_to(BRANCHING, 5)
    step.impl.move_kv(step.module, step.cache, slots[path], slots[: len(path)])
    follower = Step(Layer(alibi=True), [Request(30 + len(path), BRANCHING)], seed=1)
    key, value = step.contexts[0]
    follower.contexts = [(torch.cat([key, step.key[path]]), torch.cat([value, step.value[path]]))]
    follower.cache, follower.block_table = step.cache, step.block_table
    assert_same(follower, follower.attend(), follower.by_stock_op_on_paths())
