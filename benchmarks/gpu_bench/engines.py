# SPDX-License-Identifier: Apache-2.0
"""Engines that decode the same requests in turns, a few steps at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_bench.launches import PROPOSAL, Launches, launches_of
from gpu_bench.timing import replayed_seconds
from gpu_bench.worker import rehearsal
from vllm_medusa.capture_sizes import MAX_CAPTURED_ROWS

if TYPE_CHECKING:
    from vllm import LLM

SETTLED_TOKENS = 3
"""A request that has so many decodes: its prompt is done, and what its first steps compile is compiled."""


@dataclass(frozen=True)
class EngineOptions:
    """What all engines of a run have in common.

    Attributes:
        tiny: whether there is no GPU (see ``worker.rehearsal``).
        dtype: of weights and activations.
        max_num_batched_tokens: tokens of a step.
        block_size: tokens of a block of the cache, as vLLM has them by default on such a device.

    """

    tiny: bool
    dtype: str
    max_num_batched_tokens: int
    block_size: int

    def of(self, **others: Any) -> dict[str, Any]:
        """Return options for ``LLM``; a GPU's memory is shared by engines, so each is given its cache's size."""
        return {
            "dtype": self.dtype,
            "load_format": "dummy",
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.block_size,
            "gpu_memory_utilization": 0.1,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "seed": 0,
            "tiny": self.tiny,
        } | others


def captured_sizes(requests: Iterable[int], rows: int) -> list[int]:
    """Return the sizes, in tokens, of the CUDA graphs that are used: a proposal has one row a request."""
    return sorted({*requests, *(rows * count for count in requests if rows * count <= MAX_CAPTURED_ROWS)})


def open_engine(target: Path, heads: Path | None, tree: dict[str, Any], options: dict[str, Any]) -> LLM:
    """Start an engine in this process, plain where there are no heads."""
    further = rehearsal(speculates=heads is not None) if options.pop("tiny") else {}
    compilation = options.pop("compilation_config", {}) | further.pop("compilation_config", {})
    speculative = {"method": "medusa", "model": str(heads)} | tree
    from vllm import LLM

    return LLM(
        str(target),
        speculative_config=speculative if heads is not None else None,
        compilation_config=compilation,
        **options | further,
    )


@dataclass(frozen=True)
class Decoded:
    """What some steps did in which all requests decoded.

    Attributes:
        seconds: how long they took.
        steps: how many they were.
        tokens: what they emitted.

    """

    seconds: float
    steps: int
    tokens: int


@dataclass(frozen=True)
class Tree:
    """What an engine verifies.

    Attributes:
        rows: of each request in a step.
        depth: of the tree, which is the number of heads that run.

    """

    rows: int
    depth: int


class Engine:
    """An engine, and a batch of requests that it decodes."""

    def __init__(self, target: Path, heads: Path | None, tree: dict[str, Any], options: dict[str, Any]) -> None:
        llm = open_engine(target, heads, tree, options)
        self._engine = llm.llm_engine
        self._runner = self._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._speculator: Any = self._runner.speculator if heads is not None else None
        self._running: dict[str, int] = {}  # Tokens emitted, by request.

    def tree(self) -> Tree:
        """Return what it verifies."""
        if self._speculator is None:
            return Tree(1, 0)
        tree = self._speculator.proposer.tree
        return Tree(tree.num_nodes + 1, tree.depth)

    def begin(self, prompts: Sequence[list[int]], max_tokens: int) -> None:
        """Add requests, greedy ones, and step until all of them decode."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for prompt in prompts:
            name = str(time.monotonic_ns())
            parameters = SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
            self._running[name] = 0
        while min(self._running.values()) < SETTLED_TOKENS:
            self._step()

    def run(self, steps: int) -> Decoded:
        """Make so many steps."""
        start = time.perf_counter()
        tokens = sum(self._step() for _ in range(steps))
        return Decoded(time.perf_counter() - start, steps, tokens)

    def end(self) -> None:
        """Drop the requests."""
        self._engine.abort_request([*self._running])
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._running.clear()

    def launches(self, steps: int) -> Launches:
        """Count what the host launches in a step, by the driver's own records, averaged over so many steps."""
        speculator = self._speculator
        if speculator is None:
            return launches_of(lambda: self.run(steps), steps)
        propose = speculator.propose

        def named(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(PROPOSAL):
                return propose(*args, **kwargs)

        speculator.propose = named
        try:
            return launches_of(lambda: self.run(steps), steps)
        finally:
            del speculator.propose

    @torch.inference_mode()
    def proposal_seconds(self, requests: int) -> float:
        """Return the device's time for a proposal, from hidden states to drafts; to be called between batches."""
        speculator = self._speculator
        buffers = speculator.graphs.buffers
        hidden = buffers.hidden[:requests].normal_()

        def propose() -> None:
            if speculator.graphs.replay(requests) is None:
                speculator.proposer.propose(*buffers.inputs(requests))

        propose()
        if hidden.device.type == "cuda":
            return replayed_seconds(propose)
        start = time.perf_counter()
        propose()
        return time.perf_counter() - start

    def _step(self) -> int:
        """Make a step; return how many tokens came out of it."""
        emitted = 0
        for output in self._engine.step():
            assert not output.finished, "a request ended before the measurement did; give it more tokens"
            count = len(output.outputs[0].token_ids)
            self._running[output.request_id] += count
            emitted += count
        return emitted
