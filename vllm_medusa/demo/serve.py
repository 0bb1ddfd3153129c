"""A contender's process: one vLLM engine that decodes what it is told to, a JSON line per order and answer."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads
from vllm import LLM, SamplingParams

COUNTERS = {"drafts": "vllm:spec_decode_num_drafts", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def main(order: dict[str, Any], orders: IO[str], answers: IO[str]) -> None:
    """Decode all exact prompts in fp32 on the small model, then keep a bf16 engine of the large one for timed prompts.

    Args:
        order: ``exact`` and ``timed`` (engine options, see ``open_engine``), ``threads``, and for the exact run
            ``prompts`` and ``tokens``.
        orders: one line for each timed run: ``{"prompt": [...], "tokens": n}``.
        answers: the exact run's answer, then one line for each order.

    """
    set_num_threads(1)  # All contenders start at the same time, and the small model gains nothing from more.
    llm = open_engine(**order["exact"])
    answer(answers, decode(llm, order["prompts"], order["tokens"]))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()

    set_num_threads(order["threads"])
    llm = open_engine(**order["timed"])
    decode(llm, [order["prompts"][0]], 8)
    answer(answers, {"ready": True})
    for line in orders:
        timed = json.loads(line)
        answer(answers, decode(llm, [timed["prompt"]], timed["tokens"]))


def open_engine(model: str, dtype: str, speculative_config: dict[str, Any] | None) -> LLM:
    """Start an engine in this process."""
    return LLM(
        model=model,
        dtype=dtype,
        speculative_config=speculative_config,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        max_model_len=1024,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        seed=0,
    )


def decode(llm: LLM, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Decode greedily.

    Returns:
        ``texts``, the emitted token ids by prompt; ``seconds``, from the first token to the last, summed over prompts;
        ``drafts`` and ``accepted``, what this run adds to vLLM's counters.

    """
    before = counters(llm)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    spans = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs if output.metrics]
    return {
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": sum(spans),
        **{name: value - before[name] for name, value in counters(llm).items()},
    }


def counters(llm: LLM) -> dict[str, int]:
    """Read vLLM's own counters of speculation; zeros for an engine that does not speculate."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {name: int(found.get(metric, 0)) for name, metric in COUNTERS.items()}


def answer(answers: IO[str], content: dict[str, Any]) -> None:
    """Send one line."""
    print(json.dumps(content), file=answers, flush=True)


if __name__ == "__main__":
    # vLLM prints to standard output too, so the answers keep that pipe to themselves and the rest goes to the log.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(json.loads(Path(sys.argv[1]).read_text()), sys.stdin, channel)
