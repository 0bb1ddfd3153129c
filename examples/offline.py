# SPDX-License-Identifier: Apache-2.0
"""Decode a few prompts offline with Medusa heads and print what speculation gained.

    python examples/offline.py TARGET HEADS

Runs in seconds on 2 CPU cores with the models of ``make demo`` (TARGET = build/demo/..., HEADS = build/demo/...).
"""

import sys

from vllm import LLM, SamplingParams


def main() -> None:
    target, heads = sys.argv[1:3]
    llm = LLM(
        target,
        speculative_config={"method": "medusa", "model": heads},
        max_model_len=1024,
        gpu_memory_utilization=0.5,  # On a CPU, a share of the computer's memory, which other programs use as well.
        disable_log_stats=False,
    )
    prompts = ["import os\n\ndef ", "class Queue:\n", "for line in "]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
        print(f"--- {output.prompt!r}\n{output.outputs[0].text}")
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    steps = counters["vllm:spec_decode_num_drafts"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    print(f"--- {1 + accepted / steps:.2f} tokens per step")


if __name__ == "__main__":
    main()
