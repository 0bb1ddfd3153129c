"""A contender's engines: what its process runs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
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
    """The options of an engine.

    Attributes:
        model: the target's directory.
        dtype: of weights and cache.
        speculative_config: as ``LLM`` takes it.

    """

    model: str
    dtype: str
    speculative_config: dict[str, Any] | None

    def open(self) -> LLM:
        """Start it in this process."""
        from vllm import LLM  # The process that gives orders does without.

        gc.freeze()  # vLLM collects garbage a dozen times as it starts, and would look through all that is imported.
        return LLM(
            model=self.model,
            dtype=self.dtype,
            speculative_config=self.speculative_config,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 28,
            max_model_len=1024,
            max_num_seqs=16,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            enable_prefix_caching=False,
            seed=0,
        )


@dataclass(frozen=True)
class Order:
    """Prompts, as token ids, and how many tokens each is to be continued by."""

    prompts: list[list[int]]
    tokens: int


@dataclass(frozen=True)
class Decoded:
    """What a contender answers.

    Attributes:
        texts: the emitted token ids of each prompt.
        seconds: from the first token to the last, summed over prompts.
        drafts: what these prompts added to vLLM's counter of drafts.
        drafted: to its counter of drafted tokens.
        accepted: and to its counter of accepted ones.

    """

    texts: list[list[int]]
    seconds: float
    drafts: int
    drafted: int
    accepted: int


def serve(connection: Connection, exact: Engine, exact_order: Order, timed: Engine, threads: int) -> None:
    """Carry out one order on the exact engine, then all others on the timed one.

    Args:
        connection: gives orders, gets a ``Decoded`` for each; ``None`` says that the timed engine is ready.
        exact: the engine of the exact run.
        exact_order: its order.
        timed: the engine whose runs are timed.
        threads: those of the timed engine.

    """
    llm = exact.open()
    connection.send(decode(llm, exact_order))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()

    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for so many.
    llm = timed.open()
    connection.send(None)
    warm_up = connection.recv()
    decode(llm, Order(warm_up.prompts, WARM_UP_TOKENS))
    connection.send(None)
    while True:
        connection.send(decode(llm, connection.recv()))


def decode(llm: LLM, order: Order) -> Decoded:
    """Decode greedily."""
    from vllm import SamplingParams

    before = counters(llm)
    params = SamplingParams(temperature=0, max_tokens=order.tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in order.prompts], params, use_tqdm=False)
    spans = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs if output.metrics]
    added = {name: value - before[name] for name, value in counters(llm).items()}
    return Decoded([list(output.outputs[0].token_ids) for output in outputs], sum(spans), **added)


def counters(llm: LLM) -> dict[str, int]:
    """Read vLLM's own counters of speculation; zeros for an engine that does not speculate."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {name: int(found.get(metric, 0)) for name, metric in COUNTERS.items()}
