# SPDX-License-Identifier: Apache-2.0
"""The engines that a contender's process runs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

# Imported by name, since vLLM's CPU worker later replaces torch.set_num_threads by a warning.
from torch import set_num_threads

if TYPE_CHECKING:
    from vllm import LLM

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Engine:
    """Options of ``vllm.LLM``."""

    model: str
    dtype: str
    speculative_config: dict[str, Any] | None
    max_model_len: int = 1024
    enable_prefix_caching: bool = False

    def open(self) -> LLM:
        """Start the engine in this process."""
        from vllm import LLM  # Not at the top: the parent process need not import vLLM.

        gc.freeze()  # Excludes all imported objects from the garbage collections of vLLM's start, about a dozen.
        return LLM(
            model=self.model,
            dtype=self.dtype,
            speculative_config=self.speculative_config,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 28,
            max_model_len=self.max_model_len,
            max_num_seqs=16,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            enable_prefix_caching=self.enable_prefix_caching,
            seed=0,
        )


@dataclass(frozen=True)
class Order:
    """Prompts as token ids, and the number of tokens to decode for each."""

    prompts: list[list[int]]
    tokens: int


@dataclass(frozen=True)
class Decoded:
    """The result of an order.

    Attributes:
        texts: the emitted token ids of each prompt.
        seconds: time from the first token to the last, summed over prompts.
        drafts: number of drafts, by vLLM's counter.
        drafted: number of drafted tokens, by vLLM's counter.
        accepted: number of accepted tokens, by vLLM's counter.

    """

    texts: list[list[int]]
    seconds: float
    drafts: int
    drafted: int
    accepted: int


def serve(connection: Connection, exact: Engine, exact_order: Order, timed: Engine, threads: int) -> None:
    """Carry out one order on the exact engine, then those from the connection on the timed engine.

    Args:
        connection: receives orders and sends a ``Decoded`` for each, and ``None`` when the timed engine has started
            and when it has warmed up.
        exact: the engine of the exact run.
        exact_order: the order of the exact run.
        timed: the engine of the timed runs.
        threads: number of threads of the timed engine.

    """
    llm = exact.open()
    connection.send(decode(llm, exact_order))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()

    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm = timed.open()
    connection.send(None)
    warm_up = connection.recv()
    decode(llm, Order(warm_up.prompts, WARM_UP_TOKENS))
    connection.send(None)
    while True:
        connection.send(decode(llm, connection.recv()))


def decode(llm: LLM, order: Order) -> Decoded:
    from vllm import SamplingParams

    before = counters(llm)
    params = SamplingParams(temperature=0, max_tokens=order.tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in order.prompts], params, use_tqdm=False)
    spans = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs if output.metrics]
    added = {name: value - before[name] for name, value in counters(llm).items()}
    return Decoded([list(output.outputs[0].token_ids) for output in outputs], sum(spans), **added)


def counters(llm: LLM) -> dict[str, int]:
    """Read vLLM's counters of speculative decoding; all are 0 without speculation."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {name: int(found.get(metric, 0)) for name, metric in COUNTERS.items()}
