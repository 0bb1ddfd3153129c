# SPDX-License-Identifier: Apache-2.0
"""The engines that a contender's process runs."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

# Imported by name, since vLLM's CPU worker later replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.demo.process import answer_in_turns

if TYPE_CHECKING:
    from vllm import LLM

COUNTERS = {
    "steps": "vllm:inter_token_latency_seconds",
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
    max_num_seqs: int = 16
    kv_cache_memory_bytes: int = 1 << 28
    skip_tokenizer_init: bool = True
    structured_outputs_config: dict[str, Any] | None = None

    def open(self) -> LLM:
        """Start the engine in this process."""
        from vllm import LLM  # Not at the top: the parent process need not import vLLM.

        gc.freeze()  # Excludes all imported objects from the garbage collections of vLLM's start, about a dozen.
        return LLM(
            model=self.model,
            dtype=self.dtype,
            speculative_config=self.speculative_config,
            enforce_eager=True,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            skip_tokenizer_init=self.skip_tokenizer_init,
            structured_outputs_config=self.structured_outputs_config,
            disable_log_stats=False,
            enable_prefix_caching=self.enable_prefix_caching,
            seed=0,
        )


@dataclass(frozen=True)
class Order:
    """What to decode, greedily.

    Attributes:
        prompts: token ids of each prompt.
        tokens: most tokens of a text.
        stop: tokens that end a text, and are its last one.
        turn: seconds after which the engine pauses and shows what it has; by default it does not.

    """

    prompts: list[list[int]]
    tokens: int
    stop: tuple[int, ...] = ()
    turn: float = math.inf


@dataclass(frozen=True)
class Decoded:
    """How far an order is.

    Attributes:
        texts: the emitted token ids of each prompt.
        seconds: the engine's time in the steps behind the one that gave the first token.
        steps: number of steps behind each text's first token, with a draft or without one, by vLLM's counter.
        drafted: number of drafted tokens, by vLLM's counter.
        accepted: number of accepted tokens, by vLLM's counter.
        finished: whether all texts are complete.

    """

    texts: list[list[int]]
    seconds: float
    steps: int
    drafted: int
    accepted: int
    finished: bool = True

    @property
    def tokens_per_step(self) -> float:
        """See ``acceptance_length``."""
        return acceptance_length(self.steps, self.accepted)


@dataclass(frozen=True)
class ExactRun:
    """Orders of which only the texts matter, on an engine in fp32 with one thread."""

    engine: Engine
    order: Order


def serve(connection: Connection, timed: Engine, threads: int, exact: ExactRun | None) -> None:
    """Carry out the exact run if there is one, then orders from the connection on the timed engine.

    Args:
        connection: receives orders and sends their ``Decoded``, one a turn (see ``Order.turn``); before the next turn
            of an order it waits (see ``answer_in_turns``). The exact run's comes first, then ``None`` when the timed
            engine has started.
        timed: the engine of the timed runs.
        threads: number of threads of the timed engine.
        exact: the run for exact texts; None where the timed engine's are.

    """
    if exact is not None:
        llm = exact.engine.open()
        *_, decoded = decode(llm, exact.order)
        connection.send(decoded)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm = timed.open()
    connection.send(None)
    while True:
        answer_in_turns(connection, decode(llm, connection.recv()))


def decode(llm: LLM, order: Order) -> Iterator[Decoded]:
    """Carry out an order; yield how far it is after each turn, and last the whole."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=order.tokens,
        ignore_eos=True,  # Which tokens end a text is the order's alone.
        stop_token_ids=list(order.stop),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    before = counters(llm)
    texts: dict[str, list[int]] = {}
    for prompt in order.prompts:
        name = str(next(llm.request_counter))
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        texts[name] = []
    seconds = in_turn = 0.0
    while llm.llm_engine.has_unfinished_requests():
        has_begun = any(texts.values())
        start = time.perf_counter()
        outputs = llm.llm_engine.step()
        taken = time.perf_counter() - start
        seconds += taken if has_begun else 0.0
        in_turn += taken
        for output in outputs:
            texts[output.request_id] += output.outputs[0].token_ids
        finished = not llm.llm_engine.has_unfinished_requests()
        if in_turn >= order.turn or finished:
            in_turn = 0.0
            added = {name: value - before[name] for name, value in counters(llm).items()}
            yield Decoded([list(text) for text in texts.values()], seconds, **added, finished=finished)


def acceptance_length(steps: int, accepted: int) -> float:
    """Return the tokens per step behind texts' first tokens, from ``counters``; 1 if no such step was taken."""
    return 1 + accepted / steps if steps else 1.0


def counters(llm: LLM) -> dict[str, int]:
    """Read the requests' steps behind their first tokens, drafted tokens and accepted ones, by vLLM's counters.

    vLLM notes a latency for each such step of a request, however many tokens it emits.
    """
    from vllm.v1.metrics.reader import Counter, Histogram

    found = {
        metric.name: metric.count if isinstance(metric, Histogram) else metric.value
        for metric in llm.get_metrics()
        if isinstance(metric, Counter | Histogram)
    }
    return {name: found.get(metric, 0) for name, metric in COUNTERS.items()}
