# SPDX-License-Identifier: Apache-2.0
"""Tree attention of the backend that vLLM selects, through its own interface, against what a copy and a product reach.

An engine of one layer gives what an engine gives a layer: the selected backend, its metadata builder, a cache in the
layout that it wants. Keys, values and queries are random. Each call of a graph reads keys and values of its own, so
that the L2 cache holds none of what the next one reads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from gpu_bench.engines import EngineOptions, captured_sizes, open_engine
from gpu_bench.kernels import draft_tree
from gpu_bench.lines import Goal, Line
from gpu_bench.models import AttentionShape, Heads, Target, write_heads, write_target
from gpu_bench.roofline import Rates
from gpu_bench.tilings import tried
from gpu_bench.timing import FLOAT8, seconds
from vllm_medusa.attention import reference

PART, TILINGS = "attention", "tilings"
GOAL = Goal(least_share=0.8)
GOAL_CONTEXT = 8192
"""From this context on the goal holds: before, a step's attention is too short for a launch not to count."""

FILLED_BLOCKS = 1 << 12
"""Blocks of the cache that are filled at a time."""

TOLERANCE = {"bfloat16": 0.02, "float16": 0.01, "float32": 1e-4, FLOAT8: 0.1}
"""How far a row's output may be from the reference, as a share of its norm, by the coarsest dtype that has a part.

A key too many or too few after ``Sizes.checked_contexts``' shortest changes it more.
"""


@dataclass(frozen=True)
class Sizes:
    """What attention is measured with.

    Attributes:
        contexts: tokens before the rows of a step.
        requests: in which numbers.
        rows: of each request; one is plain decoding, natively.
        most_tokens: what the cache holds; larger steps are left out.
        read_bytes: what the calls of one graph read at least, several times what an L2 cache holds.
        checked_contexts: those after which output is compared with the reference.

    """

    contexts: tuple[int, ...]
    requests: tuple[int, ...]
    rows: tuple[int, ...]
    most_tokens: int
    read_bytes: int
    checked_contexts: tuple[int, ...]

    def cases(self) -> list[tuple[int, int, int]]:
        """Return contexts, numbers of requests and rows that the cache has room for."""
        most = max(self.rows)
        return [
            (context, requests, rows)
            for context in self.contexts
            for requests in self.requests
            if requests * (context + most) <= self.most_tokens
            for rows in self.rows
        ]


class Layer:
    """One layer of an engine, and steps for it."""

    def __init__(self, shape: AttentionShape, sizes: Sizes, options: EngineOptions, directory: Path) -> None:
        most_rows, hidden = max(sizes.rows), 2 * shape.heads
        target = Target(hidden, hidden, 1, 2 * most_rows, shape)
        heads = Heads(hidden, target.vocab, 1, True, shape.dtype)
        llm = open_engine(
            write_target(directory / "target", target),
            write_heads(directory / "heads", heads, num_heads=3, target_vocab=target.vocab),
            {"medusa_tree": "sparse", "num_speculative_tokens": most_rows - 1},
            options.of(
                max_num_seqs=max(sizes.requests),
                max_model_len=max(sizes.contexts) + 2 * most_rows,
                kv_cache_memory_bytes=int(1.1 * sizes.most_tokens * shape.slot_bytes),
                kv_cache_dtype="fp8" if shape.cache_dtype == FLOAT8 else "auto",
                compilation_config={
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": captured_sizes(sizes.requests, most_rows),
                },
            ),
        )
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        ((group,),) = runner.attn_groups
        self.shape, self._sizes, self._device = shape, sizes, runner.device
        self._builder = group.get_metadata_builder(0)
        self._layer = runner.compilation_config.static_forward_context[group.layer_names[0]]
        self._cache: torch.Tensor = self._layer.kv_cache  # [blocks, kv_heads, block_size, 2 * head_dim]
        self._fill()

    @property
    def backend(self) -> str:
        """The class that attends."""
        return type(self._layer.impl).__name__

    @torch.inference_mode()
    def check(self) -> list[Line]:
        """Compare the output with the dense reference's, for each number of rows."""
        goal = Goal(most=max(TOLERANCE[self.shape.dtype], TOLERANCE[self.shape.cache_dtype]))
        return [
            Line(
                PART,
                f"{self.shape.name}: {rows} rows after {context}, largest relative error",
                Step(self, 2, rows, context).error(),
                goal=goal,
                note=self.backend,
                details={"context": context, "rows": rows, "backend": self.backend},
            )
            for context, rows in product(self._sizes.checked_contexts, self._sizes.rows)
        ]

    @torch.inference_mode()
    def lines(self, rates: Rates, judged: bool) -> list[Line]:
        """Time all cases; the goal is for trees of the most rows."""
        lines = []
        for context, requests, rows in self._sizes.cases():
            step = Step(self, requests, rows, context)
            has_goal = judged and rows == max(self._sizes.rows) and context >= GOAL_CONTEXT
            lines.append(
                Line.timed(
                    PART,
                    f"{self.shape.name}: {requests} x {rows} rows after {context}",
                    seconds(step.calls, self._device),
                    "µs",
                    rates.floor([step.work]),
                    goal=GOAL if has_goal else None,
                    note="" if rows > 1 else "native, plain decoding",
                    details={"context": context, "requests": requests, "rows": rows, "backend": self.backend},
                )
            )
        return lines

    @torch.inference_mode()
    def tilings(self, rates: Rates) -> list[Line]:
        """Time other tilings of our kernel for one request's most rows, best first, those that fit the device."""
        from triton.runtime.errors import OutOfResources

        step, found = Step(self, 1, max(self._sizes.rows), max(self._sizes.contexts)), []
        for name in tried():
            with suppress(OutOfResources):
                found.append((seconds(step.calls, self._device), name))
        return [
            Line.timed(TILINGS, f"{self.shape.name}: {name}", taken, "µs", rates.floor([step.work]))
            for taken, name in sorted(found)
        ]

    def _fill(self) -> None:
        dtype = getattr(torch, self.shape.cache_dtype)
        for blocks in self._cache.split(FILLED_BLOCKS):
            numbers = torch.randn(blocks.shape, device=self._device, dtype=torch.float16)
            blocks.copy_(numbers.to(dtype).view(blocks.dtype))


class Step:
    """A step of one layer in which every request verifies the same tree, or with one row decodes plainly."""

    def __init__(self, layer: Layer, requests: int, rows: int, context: int) -> None:
        shape, device, sizes = layer.shape, layer._device, layer._sizes
        self._layer, self._requests, self._rows, self._context = layer, requests, rows, context
        self._tree = draft_tree(rows)
        dtype, tokens = getattr(torch, shape.dtype), requests * rows
        query = torch.randn(tokens, shape.heads, shape.head_dim, dtype=dtype, device=device)
        is_quantised = layer._layer.query_quant is not None
        self._query = query.to(getattr(torch, FLOAT8)) if is_quantised else query
        self._output = torch.empty_like(query)
        own_pairs = int(self._tree.ancestors.sum())
        self.work = shape.work(requests, rows, context, own_pairs, FLOAT8 if is_quantised else None)

        block_size = layer._cache.shape[2]
        width = -(-(context + rows) // block_size)
        step_blocks = requests * width
        blocks = torch.randperm(len(layer._cache), device=device)
        copies = max(min(-(-sizes.read_bytes // int(self.work.bytes)), len(blocks) // step_blocks), 1)
        self._block_tables = [part.view(requests, width).int() for part in blocks.split(step_blocks)[:copies]]
        self._start = torch.arange(0, tokens + 1, rows, dtype=torch.int32, device=device)
        self._announce()
        self.calls: list[Callable[[], object]] = [self._call(self._metadata(table)) for table in self._block_tables]

    def error(self) -> float:
        """Attend; return the largest difference from the reference of a row and head, as a share of its norm."""
        self.calls[0]()
        layer, worst = self._layer, 0.0
        numbers = layer._cache.view(getattr(torch, layer.shape.cache_dtype))
        for request, blocks in enumerate(self._block_tables[0].long()):
            rows = slice(request * self._rows, (request + 1) * self._rows)
            slots = numbers[blocks].float().transpose(1, 2).flatten(0, 1)[: self._context + self._rows]
            key, value = slots.split(layer.shape.head_dim, dim=-1)
            expected = reference.tree_attention(
                self._query[rows].float(),
                *(key[: self._context], value[: self._context], key[self._context :], value[self._context :]),
                self._tree.ancestors.to(key.device),
                layer.shape.head_dim**-0.5,
            )
            difference = (self._output[rows].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
            worst = max(worst, float(difference.max()))
        return worst

    def _announce(self) -> None:
        """Tell the metadata builder of the step's trees."""
        from vllm_medusa.step.derive_kernel import derive_trees_on_device
        from vllm_medusa.step.trees import StepTrees

        builder, device, rows = self._layer._builder, self._layer._device, self._rows
        if rows == 1:
            builder.trees = None
            return
        tokens = self._requests * rows
        builder.trees = derive_trees_on_device(
            parents=self._tree.parents[None, 1:].repeat(self._requests, 1).to(device),
            idx_mapping=torch.arange(self._requests, device=device),
            query_start_loc=self._start,
            cu_num_rows=self._start,
            logits_indices=torch.arange(tokens, device=device),
            input_ids=torch.zeros(tokens, dtype=torch.int32, device=device),
            positions=self._context + torch.arange(rows, device=device).repeat(self._requests),
            max_depth=self._tree.depth,
            num_drafting_reqs=self._requests,
            buffers=StepTrees.allocate(rows - 1, self._requests, tokens, device),
        )

    def _metadata(self, block_table: torch.Tensor) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        length, tokens, device = self._context + self._rows, self._requests * self._rows, self._layer._device
        return self._layer._builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=self._start,
                query_start_loc_cpu=self._start.cpu(),
                seq_lens=torch.full((self._requests,), length, dtype=torch.int32, device=device),
                num_reqs=self._requests,
                num_actual_tokens=tokens,
                max_query_len=self._rows,
                max_seq_len=length,
                block_table_tensor=block_table,
                slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
            ),
        )

    def _call(self, metadata: Any) -> Callable[[], object]:
        layer = self._layer._layer
        # What a step's own keys and values are was written to the cache before; backends look at their shape at most.
        new = self._query.new_zeros(len(self._query), self._layer.shape.kv_heads, self._layer.shape.head_dim)
        return lambda: layer.impl.forward(layer, self._query, new, new, layer.kv_cache, metadata, self._output)
