# SPDX-License-Identifier: Apache-2.0
"""The GPU backends around the kernel: what goes to it, what to vLLM's own, and what a captured step reads in replay."""

from __future__ import annotations

from tests import triton_interpreter  # noqa: F401

# isort: split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_medusa.attention import reference
from vllm_medusa.attention.triton.backend import TreeAttentionMetadata
from vllm_medusa.attention.triton.flash_backend import TreeFlashAttentionMetadataBuilder
from vllm_medusa.attention.triton.triton_backend import TreeTritonAttentionImpl, TreeTritonAttentionMetadataBuilder
from vllm_medusa.step.derive_kernel import derive_trees_on_device
from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.topology import DraftTree

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCKS = 4, 2, 32, 16, 12
TREE = DraftTree.from_parents([-1, 0, 0, 1, 1, 3])
ROWS = len(TREE)
MAX_REQUESTS, MAX_TOKENS = 4, 64


def builder(kind: type = TreeTritonAttentionMetadataBuilder) -> Any:
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: HEADS,
        get_num_kv_heads=lambda parallel: KV_HEADS,
        get_head_size=lambda: HEAD_DIM,
        rswa_window=None,
        dtype=torch.float32,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE, static_forward_context={}),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQUESTS, max_num_batched_tokens=MAX_TOKENS),
        num_speculative_tokens=ROWS - 1,
    )
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32)
    return kind(spec, [], config, torch.device("cpu"))


class Engine:
    """Buffers at fixed addresses, as the model runner has them, and one layer over a cache of random numbers."""

    def __init__(self, cache_dtype: str = "auto") -> None:
        generator = torch.Generator().manual_seed(0)
        self.cache = torch.randn(BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM, generator=generator)
        self.query = torch.randn(MAX_TOKENS, HEADS, HEAD_DIM, generator=generator)
        self.query_start = torch.zeros(MAX_REQUESTS + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_REQUESTS, dtype=torch.int32)
        self.block_table = torch.randperm(BLOCKS, generator=generator).view(MAX_REQUESTS, -1).int()
        self.builder = builder()
        self.buffers = StepTrees.allocate(ROWS - 1, MAX_REQUESTS, MAX_TOKENS, torch.device("cpu"))
        self.builder.trees = self.buffers
        with set_current_vllm_config(VllmConfig()):
            self.impl = TreeTritonAttentionImpl(
                HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None, None, cache_dtype, kv_sharing_target_layer_name=None
            )
        self.layer = SimpleNamespace(_q_scale=torch.ones(()), _k_scale=torch.ones(()), _v_scale=torch.ones(()))

    def step(self, lengths: list[int], contexts: list[int], padded: int | None = None) -> CommonAttentionMetadata:
        """Put a step's requests into the buffers; ``padded`` requests are described, the last ones empty."""
        requests = padded or len(lengths)
        ends = torch.tensor(lengths).cumsum(0)
        self.query_start[1:] = ends[-1]
        self.query_start[1 : len(lengths) + 1] = ends
        self.seq_lens.zero_()
        self.seq_lens[: len(lengths)] = torch.tensor(lengths) + torch.tensor(contexts)
        tokens = int(ends[-1]) if padded is None else requests * ROWS
        return CommonAttentionMetadata(
            query_start_loc=self.query_start[: requests + 1],
            query_start_loc_cpu=self.query_start[: requests + 1].clone(),
            seq_lens=self.seq_lens[:requests],
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=max(lengths),
            max_seq_len=BLOCKS // MAX_REQUESTS * BLOCK_SIZE,
            block_table_tensor=self.block_table[:requests],
            slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        )

    def announce(self, drafts: list[int], lengths: list[int]) -> None:
        num_reqs, ends = len(drafts), torch.tensor(lengths).cumsum(0).tolist()
        token = torch.cat([torch.arange(end - count - 1, end) for end, count in zip(ends, drafts, strict=True)])
        self.builder.trees = derive_trees_on_device(
            parents=TREE.parents[None, 1:].repeat(num_reqs, 1),
            idx_mapping=torch.arange(num_reqs),
            query_start_loc=self.query_start[: num_reqs + 1],
            cu_num_rows=torch.tensor([0, *(count + 1 for count in drafts)]).cumsum(0).int(),
            logits_indices=token,
            input_ids=torch.zeros(ends[-1], dtype=torch.int32),
            positions=torch.zeros(ends[-1], dtype=torch.int64),
            max_depth=TREE.depth,
            num_drafting_reqs=sum(count > 0 for count in drafts),
            buffers=self.buffers,
        )

    def attend(self, metadata: Any, tokens: int, *, shares_cache: bool = False) -> torch.Tensor:
        output = torch.full((tokens, HEADS, HEAD_DIM), torch.nan)
        key = None if shares_cache else torch.zeros(tokens, KV_HEADS, HEAD_DIM)
        return self.impl.forward(self.layer, self.query[:tokens], key, key, self.cache, metadata, output)

    def expected(self, lengths: list[int], contexts: list[int], trees: list[DraftTree]) -> torch.Tensor:
        rows, first = [], 0
        for index, (length, context, tree) in enumerate(zip(lengths, contexts, trees, strict=True)):
            slot = torch.arange(context + length)
            numbers = self.cache[self.block_table[index, slot // BLOCK_SIZE].long(), :, slot % BLOCK_SIZE]
            key, value = numbers.split(HEAD_DIM, dim=-1)
            query = self.query[first : first + length]
            behind, own = (key[:context], value[:context]), (key[context:], value[context:])
            rows.append(reference.tree_attention(query, *behind, *own, tree.ancestors, HEAD_DIM**-0.5))
            first += length
        return torch.cat(rows)


@pytest.mark.parametrize("shares_cache", [False, True], ids=["own cache", "another layer's cache"])
def test_requests_with_drafts_go_to_the_kernel_and_the_others_to_the_native_backend(shares_cache: bool) -> None:
    engine = Engine()
    lengths, contexts, drafts = [ROWS, 4, 1, 17], [20, 3, 30, 5], [ROWS - 1, 3, 0, 0]
    common = engine.step(lengths, contexts)
    engine.announce(drafts, lengths)
    metadata = engine.builder.build(0, common)
    assert isinstance(metadata, TreeAttentionMetadata)
    assert (metadata.num_tokens, metadata.step.max_rows) == (ROWS + 4, ROWS)
    assert (metadata.native.num_actual_tokens, metadata.native.max_query_len) == (1 + 17, 17)
    assert metadata.native.query_start_loc.tolist() == [0, 1, 18]
    trees = [TREE, TREE.prefix(4), DraftTree.chain(0), DraftTree.chain(16)]
    expected = engine.expected(lengths, contexts, trees)
    found = engine.attend(metadata, sum(lengths), shares_cache=shares_cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_queries_and_a_cache_that_the_layer_has_quantised_are_scaled_by_head() -> None:
    engine = Engine("fp8")
    layer = engine.layer
    layer._q_scale, layer._k_scale, layer._v_scale = (torch.tensor(each) for each in ([0.5, 2.0], [1.5, 0.7], [0.8, 3]))
    quantised_query, quantised_cache = (each.to(torch.float8_e4m3fn) for each in (engine.query, engine.cache))
    # What the numbers stand for, for the reference.
    engine.query = quantised_query.float() * layer._q_scale.repeat_interleave(HEADS // KV_HEADS)[:, None]
    by_number = torch.stack([layer._k_scale, layer._v_scale], dim=1).repeat_interleave(HEAD_DIM, dim=1)
    engine.cache = quantised_cache.float() * by_number[:, None]
    lengths, contexts = [ROWS, ROWS], [20, 3]
    common = engine.step(lengths, contexts)
    engine.announce([ROWS - 1, ROWS - 1], lengths)
    expected = engine.expected(lengths, contexts, [TREE, TREE])

    engine.query, engine.cache = quantised_query, quantised_cache.view(torch.uint8)
    found = engine.attend(engine.builder.build(0, common), sum(lengths))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_layer_quantises_queries_where_it_does_for_the_native_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention takes no others over an fp8 cache, and its logits are the target's."""
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    with set_current_vllm_config(VllmConfig()):
        impl = TreeTritonAttentionImpl(HEADS, HEAD_DIM, 1.0, KV_HEADS, None, None, "auto")
    assert impl.supports_quant_query_input


def test_a_step_without_drafts_is_vllms_own() -> None:
    engine = Engine()
    common = engine.step([1, 1], [20, 3])
    engine.announce([0, 0], [1, 1])
    assert not isinstance(engine.builder.build(0, common), TreeAttentionMetadata)
    engine.builder.trees = None
    assert not isinstance(engine.builder.build(0, common), TreeAttentionMetadata)


def test_what_was_captured_attends_to_the_trees_and_contexts_of_the_step_that_replays_it() -> None:
    engine = Engine()
    captured = engine.builder.build_for_cudagraph_capture(engine.step([ROWS] * MAX_REQUESTS, [0] * MAX_REQUESTS))
    assert captured.native is None
    for contexts in ([7, 21], [30, 0, 11], [16, 17, 18, 19]):
        lengths = [ROWS] * len(contexts)
        common = engine.step(lengths, contexts, padded=MAX_REQUESTS)
        engine.announce([ROWS - 1] * len(contexts), lengths)
        engine.builder.build(0, common)
        output = engine.attend(captured, MAX_REQUESTS * ROWS)
        expected = engine.expected(lengths, contexts, [TREE] * len(contexts))
        torch.testing.assert_close(output[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert output[len(expected) :].isnan().all()


def test_what_was_captured_takes_any_lengths_up_to_the_trees_where_the_device_alone_knows_them() -> None:
    engine = Engine()
    engine.builder.lengths_vary = True
    contexts = [5, 9, 20, 31]
    captured = engine.builder.build_for_cudagraph_capture(engine.step([ROWS] * MAX_REQUESTS, contexts))
    assert engine.buffers.root_positions.tolist() == contexts
    for lengths, contexts in (([ROWS, 1, 3], [7, 30, 11]), ([2, ROWS, 4, 1], [1, 2, 3, 4]), ([1, 1], [20, 3])):
        common = engine.step(lengths, contexts, padded=MAX_REQUESTS)
        # The host has spread the rows evenly.
        common.query_start_loc_cpu[1 : len(lengths)] = 0
        engine.announce([length - 1 for length in lengths], lengths)
        assert isinstance(engine.builder.build(0, common), TreeAttentionMetadata)
        output = engine.attend(captured, MAX_REQUESTS * ROWS)
        expected = engine.expected(lengths, contexts, [TREE.prefix(length) for length in lengths])
        torch.testing.assert_close(output[: len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_a_step_of_prompts_is_vllms_own_also_where_lengths_vary() -> None:
    engine = Engine()
    engine.builder.lengths_vary = True
    common = engine.step([1, 9], [20, 0])
    engine.announce([0, 0], [1, 9])
    assert not isinstance(engine.builder.build(0, common), TreeAttentionMetadata)


@pytest.mark.parametrize("kind", [TreeFlashAttentionMetadataBuilder, TreeTritonAttentionMetadataBuilder])
def test_whole_graphs_are_declared_for_decodes_of_any_lengths_up_to_the_trees(kind: type) -> None:
    assert kind.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
    assert kind.get_varlen_cudagraph_max_query_len(SimpleNamespace(num_speculative_tokens=5), None) == 6


@pytest.mark.parametrize(
    ("option", "said"), [({"alibi_slopes": [0.5] * HEADS}, "ALiBi"), ({"chunk_lookback": 1}, "chunked local attention")]
)
def test_what_the_kernel_has_not_is_refused_by_name(option: dict[str, Any], said: str) -> None:
    options = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **option}
    with pytest.raises(ValueError, match=f"medusa_tree: .* with {said} .* give medusa_tree"):
        TreeTritonAttentionImpl(HEADS, HEAD_DIM, 1.0, KV_HEADS, **options)
