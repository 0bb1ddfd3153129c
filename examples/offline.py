# SPDX-License-Identifier: Apache-2.0
"""Let a chat model answer a few questions offline with Medusa heads, and print what speculation gained.

    python examples/offline.py TARGET HEADS [DTYPE]

With the model and heads of ``make demo`` (TARGET = build/smollm2, HEADS = examples/heads/smollm2-135m-instruct) it
takes about a minute on 2 CPU cores. On CPUs without bf16 instructions give float32 as DTYPE: bf16 is several times
slower there.
"""

import sys

from vllm import LLM, SamplingParams

QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Give three reasons to learn a language.",
)


def main() -> None:
    target, heads, dtype = (*sys.argv[1:], "auto")[:3]
    llm = LLM(
        target,
        dtype=dtype,
        speculative_config={"method": "medusa", "model": heads},
        max_model_len=1024,
        enforce_eager=True,  # Compiling takes longer than these few answers; a server should.
        kv_cache_memory_bytes=1 << 28,  # By default vLLM takes most of the memory, on a CPU the computer's.
        disable_log_stats=False,
    )
    dialogues = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(dialogues, SamplingParams(temperature=0, max_tokens=64))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"--- {question}\n{output.outputs[0].text}")
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    steps = metrics["vllm:inter_token_latency_seconds"].count  # One a step of a request, however many tokens it emits.
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"].value
    drafted = metrics["vllm:spec_decode_num_draft_tokens"].value
    print(f"--- {1 + accepted / steps:.2f} tokens per step, {drafted / steps:.1f} nodes verified a step")
    if not drafted:
        print('--- With these heads no node pays on this machine; "medusa_budget": "off" verifies them all the same.')


if __name__ == "__main__":
    main()
