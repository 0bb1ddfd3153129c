# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of tree attention against the dense reference, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import bitmasks_of, deterministic, trees
from vllm_medusa.attention import reference
from vllm_medusa.attention.triton.ops import AttentionStep, LayerOptions, Workspace, tree_attention
from vllm_medusa.attention.triton.tiling import MAX_BLOCK_ROWS, Gpu, Tiling, choose_tiling
from vllm_medusa.step.trees import CAUSAL, WORD_BITS
from vllm_medusa.tree.topology import DraftTree

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
UNTOUCHED = 7.0
GPU = Gpu(processors=8, has_warpgroups=True)


def tiling(block_rows: int = 32, tile: int = 32, splits: int = 1) -> Tiling:
    return Tiling(block_rows, tile, splits, warps=4, stages=1)


Layout = Callable[[int, int, int, int], torch.Tensor]
"""``layout(blocks, block_size, kv_heads, head_dim)``: NaN, ``[keys or values, blocks, block_size, kv_heads, dim]``."""


def by_head(blocks: int, block_size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """vLLM's layout HND: ``[blocks, kv_heads, block_size, 2 * head_dim]``."""
    cache = torch.full((blocks, kv_heads, block_size, 2, head_dim), torch.nan)
    return cache.permute(3, 0, 2, 1, 4)


def by_slot(blocks: int, block_size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """vLLM's layout NHD: ``[blocks, block_size, kv_heads, 2 * head_dim]``."""
    cache = torch.full((blocks, block_size, kv_heads, 2, head_dim), torch.nan)
    return cache.permute(3, 0, 1, 2, 4)


def apart(blocks: int, block_size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """All keys, then all values."""
    return torch.full((2, blocks, block_size, kv_heads, head_dim), torch.nan)


@dataclass(frozen=True)
class Layer:
    """What an attention layer computes, and how its cache lies in memory."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    is_quantised: bool = False
    has_quantised_queries: bool = False
    has_scales_by_head: bool = False
    soft_cap: float | None = None
    window: int | None = None
    has_sinks: bool = False
    block_size: int = 16
    layout: Layout = by_head

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Request:
    """A draft tree behind a context, or as many causal rows."""

    context: int
    tree: DraftTree
    is_causal: bool = False

    @classmethod
    def causal(cls, context: int, rows: int) -> Request:
        return cls(context, DraftTree.chain(rows - 1), is_causal=True)

    @property
    def rows(self) -> int:
        return len(self.tree)


def scaled(numbers: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """``[tokens, heads, head_dim]``, each KV head's numbers times its scale, float64."""
    if scale is None:
        return numbers.double()
    by_head = scale.expand(max(scale.numel(), 1)).repeat_interleave(numbers.shape[1] // max(scale.numel(), 1))
    return numbers.double() * by_head[:, None]


@dataclass
class Step:
    """Requests with random tensors, in a paged cache that holds NaN wherever no row may look; then padding requests."""

    layer: Layer
    requests: list[Request]
    padding: int = 0
    seed: int = 0
    output: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        layer, generator = self.layer, torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.start = torch.tensor([0, *(request.rows for request in self.requests)]).cumsum(0).tolist()
        tokens, heads = self.start[-1] + self.padding, layer.kv_heads * layer.group
        self.query = random(tokens, heads, layer.head_dim).to(
            torch.float8_e4m3fn if layer.has_quantised_queries else layer.dtype
        )
        self.query[self.start[-1] :] = torch.nan
        self.sinks = random(heads).to(layer.dtype) if layer.has_sinks else None
        each = 0.5 + random(layer.kv_heads).abs() if layer.has_scales_by_head else torch.tensor(1.5)
        self.query_scale = each * 0.5 if layer.has_quantised_queries else None
        self.scales = (each.flip(0) if each.dim() else each, each * 0.7) if layer.is_quantised else (None, None)

        widest = max(-(-(request.context + request.rows) // layer.block_size) for request in self.requests)
        pages = len(self.requests) * widest
        self.block_table = 1 + torch.randperm(pages, generator=generator).view(-1, widest)
        empty = layer.layout(1 + pages, layer.block_size, layer.kv_heads, layer.head_dim)
        storage = torch.as_strided(empty, (empty.untyped_storage().nbytes() // 4,), (1,))
        storage = storage.to(torch.float8_e4m3fn if layer.is_quantised else layer.dtype)
        self.cache = torch.as_strided(storage, empty.shape, empty.stride())
        for index, request in enumerate(self.requests):
            seen_from = 0 if layer.window is None else max(0, request.context - layer.window + 1)
            slot = torch.arange(seen_from, request.context + request.rows)
            page = self.block_table[index, slot // layer.block_size]
            numbers = random(2, len(slot), layer.kv_heads, layer.head_dim).to(self.cache.dtype)
            self.cache[:, page, slot % layer.block_size] = numbers

    def attend(self, tiling: Tiling | None, *, contexts_apart: bool) -> None:
        layer, padding, tokens = self.layer, self.padding, len(self.query)
        bitmasks = [bitmasks_of(request.tree) for request in self.requests]
        ancestors = torch.zeros(tokens, max(mask.shape[1] for mask in bitmasks), dtype=torch.int64)
        depth = torch.full((tokens,), -99)
        for first, request, mask in zip(self.start, self.requests, bitmasks, strict=False):
            rows = slice(first, first + request.rows)
            if request.is_causal:
                ancestors[rows, 0] = CAUSAL
            else:
                ancestors[rows, : mask.shape[1]] = mask
                depth[rows] = request.tree.depths
        step = AttentionStep(
            query_start_loc=torch.tensor([*self.start, *[self.start[-1]] * padding], dtype=torch.int32),
            seq_lens=torch.tensor(
                [request.context + request.rows for request in self.requests] + [0] * padding, dtype=torch.int32
            ),
            block_table=torch.nn.functional.pad(self.block_table, (0, 0, 0, padding)).int(),
            ancestor_bits=ancestors,
            depths=depth,
            max_rows=max(request.rows for request in self.requests),
        )
        options = LayerOptions(layer.scale, layer.soft_cap, layer.window, self.sinks, self.query_scale, *self.scales)
        workspace = Workspace.allocate(layer.head_dim, layer.dtype, GPU, torch.device("cpu"))
        workspace.partial.fill_(torch.nan)
        workspace.log_total.fill_(torch.nan)
        self.output = torch.full_like(self.query, UNTOUCHED, dtype=layer.dtype)
        context_lse = self.attend_to_contexts() if contexts_apart else None
        tree_attention(self.query, *self.cache, self.output, step, options, workspace, context_lse, tiling)

    def attend_to_contexts(self) -> torch.Tensor:
        """Write attention to the contexts into the output and return its log-sum-exp; NaN where there is no context."""
        layer, context_lse = self.layer, torch.full(self.query.shape[1::-1], torch.nan)
        for index, request in enumerate(self.requests):
            rows = slice(self.start[index], self.start[index + 1])
            key, value = (each[: request.context] for each in self.slots(index))
            if not request.context:
                self.output[rows] = torch.nan
                continue
            key, value = (each.repeat_interleave(layer.group, dim=1) for each in (key, value))
            scores = layer.scale * torch.einsum("qhd,khd->hqk", scaled(self.query[rows], self.query_scale), key)
            if layer.soft_cap is not None:
                scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
            context_lse[:, rows] = scores.logsumexp(dim=-1).float()
            self.output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value).to(layer.dtype)
        return context_lse

    def slots(self, index: int) -> list[torch.Tensor]:
        """One request's keys and values, ``[context + rows, kv_heads, head_dim]`` each, float64."""
        request = self.requests[index]
        slot = torch.arange(request.context + request.rows)
        page = self.block_table[index, slot // self.layer.block_size]
        return [
            scaled(tensor[page, slot % self.layer.block_size], scale).nan_to_num()
            for tensor, scale in zip(self.cache, self.scales, strict=True)
        ]

    def expected(self, index: int) -> torch.Tensor:
        """One request's rows by the reference, in float64."""
        layer, request = self.layer, self.requests[index]
        key, value = self.slots(index)
        query = scaled(self.query[self.start[index] : self.start[index + 1]], self.query_scale)
        ancestors, depths = request.tree.ancestors, request.tree.depths
        if self.sinks is not None:
            # One more number per head and one more row: a key that every row sees, whose score is the sink.
            sink = self.sinks.double()
            if layer.soft_cap is not None:
                sink = layer.soft_cap * torch.atanh(sink / layer.soft_cap)
            query = torch.cat([query, (sink / layer.scale).expand(request.rows, -1)[:, :, None]], dim=2)
            query = torch.cat([query, query[-1:]])
            key = torch.nn.functional.pad(key, (0, 1, 0, 0, 0, 1))
            key[-1, :, -1] = 1
            value = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 1))
            ancestors = torch.nn.functional.pad(ancestors, (0, 1, 0, 1), value=True)
            depths = torch.cat([depths, depths.max()[None]])
        context = request.context
        attended = reference.tree_attention(
            query, key[:context], value[:context], key[context:], value[context:], ancestors, layer.scale,
            layer.soft_cap, layer.window, depths,
        )  # fmt: skip
        return attended[: request.rows]

    def check(self, tiling: Tiling | None, *, contexts_apart: bool = False) -> None:
        self.attend(tiling, contexts_apart=contexts_apart)
        tolerance = TOLERANCE[self.layer.dtype]
        for index in range(len(self.requests)):
            found = self.output[self.start[index] : self.start[index + 1]].double()
            torch.testing.assert_close(found, self.expected(index), rtol=tolerance, atol=tolerance)
        assert (self.output[self.start[-1] :] == UNTOUCHED).all()


layers = st.builds(
    Layer,
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 4, 7, 8]),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    dtype=st.sampled_from(list(TOLERANCE)),
    is_quantised=st.booleans(),
    has_quantised_queries=st.booleans(),
    has_scales_by_head=st.booleans(),
    soft_cap=st.none() | st.floats(4, 20),
    window=st.none() | st.integers(1, 60),
    has_sinks=st.booleans(),
    block_size=st.sampled_from([16, 32]),
    layout=st.sampled_from([by_head, by_slot, apart]),
)
contexts = st.integers(0, 90)
requests = st.one_of(
    st.builds(Request, contexts, trees(max_rows=12)),
    st.builds(Request, contexts, st.integers(0, 5).map(DraftTree.chain)),
    st.builds(Request.causal, contexts, st.integers(1, 24)),
)
tilings = st.builds(tiling, st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64]), st.integers(1, 8))


@settings(deterministic, max_examples=24)
@given(layers, st.lists(requests, min_size=1, max_size=3), st.integers(0, 2), tilings | st.none(), st.integers(0, 99))
def test_every_row_of_a_mixed_batch_attends_as_the_reference_says(
    layer: Layer, requests: list[Request], padding: int, tiling: Tiling | None, seed: int
) -> None:
    Step(layer, requests, padding, seed).check(tiling)


@settings(deterministic, max_examples=16)
@given(
    layers.map(lambda layer: replace(layer, window=None)),
    st.lists(requests, min_size=1, max_size=3),
    st.integers(0, 2),
    tilings.map(lambda tiling: replace(tiling, splits=1)) | st.none(),
    st.integers(0, 99),
)
def test_rows_whose_contexts_are_attended_to_elsewhere_attend_as_the_reference_says(
    layer: Layer, requests: list[Request], padding: int, tiling: Tiling | None, seed: int
) -> None:
    Step(layer, requests, padding, seed).check(tiling, contexts_apart=True)


def wide_tree(rows: int, branches: int) -> DraftTree:
    """A tree in which every row but the last ones has that many children."""
    return DraftTree.from_parents([-1, *((row - 1) // branches for row in range(1, rows))])


@pytest.mark.parametrize("rows", [WORD_BITS, WORD_BITS + 1, 3 * WORD_BITS + 2])
@pytest.mark.parametrize("window", [None, 6])
def test_trees_may_be_longer_than_a_word(rows: int, window: int | None) -> None:
    layer = Layer(group=1, kv_heads=1, window=window)
    Step(layer, [Request(21, wide_tree(rows, 2)), Request.causal(40, 3)]).check(tiling(64, 64))


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_slots_may_be_split_finer_than_they_are_many(splits: int) -> None:
    step = [Request(100, wide_tree(7, 2)), Request(0, wide_tree(4, 3)), Request.causal(0, 1), Request.causal(33, 20)]
    Step(Layer(window=40 if splits % 2 else None), step, padding=2).check(tiling(16, 16, splits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_large_scores_neither_overflow_nor_vanish(dtype: torch.dtype, soft_cap: float | None) -> None:
    step = Step(Layer(dtype=dtype, soft_cap=soft_cap, kv_heads=1), [Request(70, wide_tree(5, 2))])
    step.query *= 200
    step.check(tiling(16, 32, 2))


def test_the_workspace_holds_what_any_chosen_tiling_writes() -> None:
    workspace = Workspace.allocate(128, torch.bfloat16, Gpu(132, has_warpgroups=True), torch.device("meta"))
    for max_rows in (1, 2, 5, 16, 64, 200, 2048):
        for requests in (1, 3, 32, 256):
            for heads, kv_heads in ((32, 32), (32, 8), (28, 4), (8, 1)):
                tokens = max_rows * requests
                chosen = choose_tiling(
                    tokens, requests, max_rows, heads, kv_heads, 128, 2, 2, workspace.gpu,
                    own_rows_only=False, bends_scores=False,
                )  # fmt: skip
                assert chosen.block_rows <= MAX_BLOCK_ROWS
                if chosen.splits > 1:
                    assert tokens * heads * chosen.splits <= len(workspace.log_total)
