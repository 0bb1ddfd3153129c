# SPDX-License-Identifier: Apache-2.0
"""Steps of attention on a CPU with random tensors: what the backend makes of them, and what is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_medusa.attention.cpu.backend import TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder
from vllm_medusa.attention.reference import tree_attention
from vllm_medusa.step.trees import derive_trees
from vllm_medusa.tree.topology import DraftTree

BRANCHING = DraftTree.from_parents([-1, 0, 0, 1, 1, 2, 3])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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
    block_size: int = 32

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
            block_size=self.block_size, num_kv_heads=self.kv_heads, head_size=self.head_dim, dtype=self.dtype
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
        columns = int(-(-self.seq_lens.max() // self.layer.block_size))
        blocks = torch.randperm(len(rows) * columns + 1, generator=self.generator)
        self.block_table = blocks[: len(rows) * columns].view(len(rows), columns).int()
        self.cache = self.random(len(blocks), self.layer.kv_heads, self.layer.block_size, 2 * self.layer.head_dim)
        for index, (key, value) in enumerate(self.contexts):
            self.write(key, value, self.slots(index, 0, len(key)))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.layer.dtype)

    def slots(self, request: int, first: int, last: int) -> torch.Tensor:
        position, size = torch.arange(first, last), self.layer.block_size
        return self.block_table[request, position // size].long() * size + position % size

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
        lengths, size = torch.tensor([len(key) for key, _ in sequences]), self.layer.block_size
        columns = int(-(-lengths.max() // size))
        table = torch.arange(len(sequences) * columns).view(len(sequences), columns)
        shape = (len(sequences) * columns, self.layer.kv_heads, size, 2 * self.layer.head_dim)
        cache = torch.zeros(shape, dtype=self.layer.dtype)
        slots = torch.cat([row * columns * size + torch.arange(n) for row, n in enumerate(lengths.tolist())])
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
