# SPDX-License-Identifier: Apache-2.0
"""The tree attention for CPUs against the dense reference and against vLLM's own op on each row's path."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.unit.strategies import deterministic, path_to, trees
from vllm_medusa.attention.cpu import (
    TreeCPUAttentionImpl,
    TreeCPUAttentionMetadata,
    TreeCPUAttentionMetadataBuilder,
)
from vllm_medusa.attention.reference import tree_attention
from vllm_medusa.step.trees import derive_trees
from vllm_medusa.tree.static import cartesian
from vllm_medusa.tree.topology import DraftTree

BLOCK_SIZE = 32
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
some = settings(deterministic, max_examples=50)
few = settings(deterministic, max_examples=15)


@dataclass(frozen=True)
class Layer:
    """What an attention layer computes."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    soft_cap: float | None = None
    window: int | None = None
    alibi: bool = False
    sinks: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def impl(self) -> TreeCPUAttentionImpl:
        config = SimpleNamespace(model_config=SimpleNamespace(dtype=self.dtype))
        with mock.patch.object(cpu_attn, "get_current_vllm_config", return_value=config):
            return TreeCPUAttentionImpl(
                num_heads=self.heads,
                head_size=self.head_dim,
                scale=self.scale,
                num_kv_heads=self.kv_heads,
                alibi_slopes=[0.05 * 1.5**head for head in range(self.heads)] if self.alibi else None,
                sliding_window=self.window,
                kv_cache_dtype="auto",
                logits_soft_cap=self.soft_cap,
                sinks=torch.linspace(-1, 2, self.heads).to(self.dtype) if self.sinks else None,
            )

    def builder(self) -> TreeCPUAttentionMetadataBuilder:
        config = SimpleNamespace(
            parallel_config=None,
            model_config=SimpleNamespace(dtype=self.dtype, get_num_attention_heads=lambda _: self.heads),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=self.kv_heads, head_size=self.head_dim, dtype=self.dtype
        )
        return TreeCPUAttentionMetadataBuilder(spec, [], config, torch.device("cpu"))


@dataclass(frozen=True)
class Request:
    """One request of a step: a tree behind a context, or without one a prefill chunk."""

    context: int
    tree: DraftTree | None
    chunk: int = 1

    @property
    def rows(self) -> int:
        return len(self.tree) if self.tree is not None else self.chunk

    @property
    def mask(self) -> torch.Tensor:
        """``[rows, rows]``, bool: row i may attend to row j."""
        return (self.tree or DraftTree.chain(self.rows - 1)).ancestors


@dataclass
class Step:
    """A step's requests with random tensors, laid out in a paged cache that holds garbage everywhere else."""

    layer: Layer
    requests: list[Request]
    seed: int = 0
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    cache: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.impl = self.layer.impl()
        self.builder = self.layer.builder()
        self.module: Any = SimpleNamespace(isa=self.builder.isa, _k_scale_float=1.0, _v_scale_float=1.0)
        rows = [request.rows for request in self.requests]
        self.start = torch.tensor([0, *rows]).cumsum(0)
        self.seq_lens = torch.tensor([request.context + request.rows for request in self.requests])
        kv = (self.layer.kv_heads, self.layer.head_dim)
        self.query = self.random(sum(rows), self.layer.heads, self.layer.head_dim)
        self.key, self.value = self.random(sum(rows), *kv), self.random(sum(rows), *kv)
        self.contexts = [
            (self.random(request.context, *kv), self.random(request.context, *kv)) for request in self.requests
        ]
        columns = int(-(-self.seq_lens.max() // BLOCK_SIZE))
        blocks = torch.randperm(len(rows) * columns + 1, generator=self.generator)
        self.block_table = blocks[: len(rows) * columns].view(len(rows), columns).int()
        self.cache = self.random(len(blocks), self.layer.kv_heads, BLOCK_SIZE, 2 * self.layer.head_dim)
        for index, (key, value) in enumerate(self.contexts):
            self.write(key, value, self.slots(index, 0, len(key)))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.layer.dtype)

    def slots(self, request: int, first: int, last: int) -> torch.Tensor:
        position = torch.arange(first, last)
        return self.block_table[request, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.impl.do_kv_cache_update(self.module, key, value, self.cache, slots)

    def metadata(self) -> Any:
        """Plan the step as the model runner does and build its metadata."""
        num_drafts = [len(request.tree) - 1 if request.tree is not None else 0 for request in self.requests]
        parents = torch.arange(max(num_drafts) or 1).repeat(len(self.requests), 1)
        for row, request in zip(parents, self.requests, strict=True):
            if request.tree is not None:
                row[: len(request.tree) - 1] = request.tree.parents[1:]
        ends, num_tokens = self.start[1:].tolist(), int(self.start[-1])
        self.builder.trees = derive_trees(
            parents,
            cu_num_rows=torch.tensor([0, *(count + 1 for count in num_drafts)]).cumsum(0),
            logits_indices=torch.cat(
                [torch.arange(end - count - 1, end) for end, count in zip(ends, num_drafts, strict=True)]
            ),
            input_ids=torch.zeros(num_tokens, dtype=torch.int32),
            positions=torch.zeros(num_tokens, dtype=torch.int64),
            max_depth=max(int(request.mask.sum(dim=1).max()) - 1 for request in self.requests),
            num_drafting_reqs=len(self.requests),
        )
        slots = [
            self.slots(index, request.context, request.context + request.rows)
            for index, request in enumerate(self.requests)
        ]
        return self.builder.build(0, common_metadata(self.start, self.seq_lens, self.block_table, torch.cat(slots)))

    def attend(self) -> torch.Tensor:
        """Write the step's keys and values as vLLM does before attention, then attend."""
        metadata = self.metadata()
        for index, request in enumerate(self.requests):
            rows = slice(int(self.start[index]), int(self.start[index + 1]))
            slots = self.slots(index, request.context, request.context + request.rows)
            self.write(self.key[rows], self.value[rows], slots)
        output = torch.full_like(self.query, float("nan"))
        self.impl.forward(self.module, self.query, self.key, self.value, self.cache, metadata, output)
        return output

    def by_reference(self) -> torch.Tensor:
        """Attend with the dense reference, request by request."""
        output = []
        for index, request in enumerate(self.requests):
            rows = slice(int(self.start[index]), int(self.start[index + 1]))
            tensors = (self.query[rows], *self.contexts[index], self.key[rows], self.value[rows])
            options = {"soft_cap": self.layer.soft_cap, "sliding_window": self.layer.window}
            output.append(tree_attention(*tensors, request.mask, self.layer.scale, **options))
        return torch.cat(output)

    def by_stock_op_on_paths(self) -> torch.Tensor:
        """Attend with vLLM's own op, each row as the last token of a sequence of its own: the context and its path."""
        sequences = []
        for index, request in enumerate(self.requests):
            for row in range(request.rows):
                path = request.mask[row].nonzero().flatten() + self.start[index]
                context_key, context_value = self.contexts[index]
                pair = torch.cat([context_key, self.key[path]]), torch.cat([context_value, self.value[path]])
                sequences.append(pair)
        lengths = torch.tensor([len(key) for key, _ in sequences])
        columns = int(-(-lengths.max() // BLOCK_SIZE))
        table = torch.arange(len(sequences) * columns).view(len(sequences), columns)
        shape = (len(sequences) * columns, self.layer.kv_heads, BLOCK_SIZE, 2 * self.layer.head_dim)
        cache = torch.zeros(shape, dtype=self.layer.dtype)
        slots = torch.cat([row * columns * BLOCK_SIZE + torch.arange(n) for row, n in enumerate(lengths.tolist())])
        keys, values = (torch.cat(tensors) for tensors in zip(*sequences, strict=True))
        self.impl.do_kv_cache_update(self.module, keys, values, cache, slots)
        builder = self.layer.builder()
        last = slots[lengths.cumsum(0) - 1]
        metadata = builder.build(0, common_metadata(torch.arange(len(lengths) + 1), lengths, table.int(), last))
        output = torch.full_like(self.query, float("nan"))
        self.impl.forward(self.module, self.query, self.key, self.value, cache, metadata, output)
        return output


def common_metadata(
    start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, slots: torch.Tensor
) -> CommonAttentionMetadata:
    return CommonAttentionMetadata(
        query_start_loc=start.int(),
        query_start_loc_cpu=start.int(),
        seq_lens=seq_lens.int(),
        num_reqs=len(seq_lens),
        num_actual_tokens=int(start[-1]),
        max_query_len=int(start.diff().max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=slots,
    )


def assert_same(step: Step, output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[step.layer.dtype]
    torch.testing.assert_close(output.float(), expected.float(), atol=tolerance, rtol=tolerance)


contexts = st.integers(0, 80)
requests = st.builds(Request, contexts, trees(max_rows=12)) | st.builds(
    Request, contexts, st.none(), chunk=st.integers(1, 40)
)
batches = st.lists(requests, min_size=1, max_size=5)
seeds = st.integers(0, 9)
windows = st.none() | st.integers(1, 40)
soft_caps = st.none() | st.floats(0.5, 5)
BRANCHING = DraftTree.from_parents([-1, 0, 0, 1, 1, 2, 3])


@some
@given(
    st.builds(
        Layer,
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        head_dim=st.sampled_from([32, 64]),
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


def test_a_step_without_branching_trees_is_left_to_the_stock_op() -> None:
    step = Step(Layer(), [Request(40, DraftTree.chain(4)), Request(0, None, chunk=9)])
    assert isinstance(step.metadata(), cpu_attn.CPUAttentionMetadata)
    step = Step(Layer(), [Request(40, DraftTree.chain(4)), Request(7, BRANCHING)])
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert metadata.native is not None
    assert metadata.native.token_indices.tolist() == list(range(5))
    assert metadata.context.tolist() == [7]


def test_trees_that_are_alone_in_a_step_need_no_stock_metadata() -> None:
    step = Step(Layer(), [Request(40, BRANCHING), Request(7, BRANCHING)])
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert metadata.native is None
    assert metadata.in_order
    assert_same(step, step.attend(), step.by_reference())


@pytest.mark.parametrize("other", [Request(7, BRANCHING.prefix(4)), Request(7, DraftTree.chain(4))])
def test_rows_are_not_taken_in_order_where_trees_are_padded_or_not_alone(other: Request) -> None:
    step = Step(Layer(), [Request(40, BRANCHING), other])
    metadata = step.metadata()
    assert isinstance(metadata, TreeCPUAttentionMetadata)
    assert not metadata.in_order
    assert_same(step, step.attend(), step.by_reference())


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
    keys, values = step.cache.view(blocks, kv_heads, 2 * BLOCK_SIZE, width // 2).chunk(2, dim=2)
    keys = keys.reshape(blocks, kv_heads, width // 2, BLOCK_SIZE)
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    return keys[block, :, :, offset], values[block, :, offset]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@few
@given(st.integers(1, 3), st.data())
def test_moved_rows_arrive_as_they_were_and_no_other_slot_changes(
    dtype: torch.dtype, kv_heads: int, data: st.DataObject
) -> None:
    step = Step(Layer(kv_heads, dtype=dtype), [Request(70, BRANCHING)])
    everywhere = torch.arange(step.cache.shape[0] * BLOCK_SIZE)
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
