"""Decodes a mixed batch on model runner V2 and prints what came of it as JSON: a process for Triton's interpreter.

python -m tests.integration.v2_process '{"model": ..., "prompts": [...], "heads": ..., "tree": ...}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests import triton_interpreter  # noqa: F401

# isort: split
import torch
from vllm import LLM, SamplingParams

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    {"temperature": 0.9, "bad_words_token_ids": [[7], [11, 12]], "min_p": 0.05},
    {"temperature": 0, "presence_penalty": 0.5, "logprobs": 2},
)


def use_triton_attention() -> None:
    """Give every layer the attention that GPUs have: the CPU platform knows one backend, so that one is overridden."""
    from contextlib import nullcontext

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_medusa.runner import v2_cpu
    from vllm_medusa.runner.commit_kernel import KernelCommit

    # vLLM's cache-write kernel asks what its device can do before it chooses a tile.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_medusa.attention.triton.TreeTritonAttentionBackend")
    v2_cpu.MedusaModelRunner.tree_attention_selected = staticmethod(nullcontext)
    v2_cpu.MedusaModelRunner.commit_class = KernelCommit


def allow_async_scheduling() -> None:
    """Keep the CPU platform, which sees no use in it, from turning asynchronous scheduling off."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


def main(order: dict[str, Any]) -> None:
    heads = order.get("heads")
    if order.get("async_scheduling"):
        allow_async_scheduling()
    if order.get("attention") == "triton":
        use_triton_attention()
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
        async_scheduling=order.get("async_scheduling", False),
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
                "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
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
