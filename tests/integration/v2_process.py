"""Decodes a mixed batch on model runner V2 and prints what came of it as JSON: a process for Triton's interpreter.

python -m tests.integration.v2_process '{"model": ..., "prompts": [...], "heads": ..., "tree": ...}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests import triton_interpreter  # noqa: F401

# isort: split
from vllm import LLM, SamplingParams

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    {"temperature": 0.9, "bad_words_token_ids": [[7], [11, 12]], "min_p": 0.05},
    {"temperature": 0, "presence_penalty": 0.5, "logprobs": 2},
)


def main(order: dict[str, Any]) -> None:
    heads = order.get("heads")
    llm = LLM(
        order["model"],
        speculative_config={"method": "medusa", "model": heads, "medusa_tree": order["tree"]} if heads else None,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=1 << 26,
        disable_log_stats=False,
    )
    params = []
    for index in range(len(order["prompts"])):
        options = dict(KINDS[index % len(KINDS)])
        bad = options.pop("bad_words_token_ids", None)
        params.append(SamplingParams(**options, seed=index, max_tokens=16, ignore_eos=True, detokenize=False))
        params[-1]._bad_words_token_ids = bad
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in order["prompts"]], params, use_tqdm=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    print(
        json.dumps(
            {
                "runner": type(runner).__module__,
                "texts": [list(output.outputs[0].token_ids) for output in outputs],
                "logprobs": [
                    [
                        {str(token): entry.logprob for token, entry in step.items()}
                        for step in output.outputs[0].logprobs
                    ]
                    for output in outputs
                    if output.outputs[0].logprobs
                ],
                "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
