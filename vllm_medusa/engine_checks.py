# SPDX-License-Identifier: Apache-2.0
"""What no engine with Medusa can be: targets, and combinations with vLLM's other features, refused at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_medusa.compat.names import WORKERS
from vllm_medusa.tree.options import Tree

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

CACHE_DTYPES = {
    "cpu": ("auto", "float16", "bfloat16"),
    "cuda": ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"),
}
"""KV caches under which each platform's attention can mask a branching tree."""


def check_target(target: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ``ValueError`` for a platform, target or split of it that Medusa cannot serve, whatever the tree."""
    platform = current_platform.device_type
    if platform not in WORKERS:
        raise ValueError(
            f"speculative_config: method 'medusa' runs on {sorted(WORKERS)}, not on {platform!r}; drop it there"
        )
    context_parallel = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    unsupported = {
        "attention-free models": target.is_attention_free,
        "hybrid models (Mamba, linear attention)": target.is_hybrid,
        "encoder-decoder models": target.is_encoder_decoder,
        "pooling models": target.runner_type == "pooling",
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": context_parallel > 1,
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "trace replay (enable_trace_replay)": target.enable_trace_replay,
    }
    for what, asked in unsupported.items():
        if asked:
            raise ValueError(f"speculative_config: method 'medusa' does not support {what} ({target.model!r}); drop it")


def check_branching(tree: Tree, target: ModelConfig) -> None:
    """Raise ``ValueError`` if the tree branches, and the target can verify chains alone."""
    unsupported = {
        "multi-head latent attention": target.use_mla,
        "multi-dimensional rotary positions": target.uses_mrope,
        "a window that leaves the prompt visible (rswa_window)": target.rswa_window is not None,
    }
    for what, used in unsupported.items():
        if used and tree.branches:
            raise ValueError(
                f"medusa_tree: a branching tree cannot verify a model with {what} ({target.model!r}); "
                'give medusa_tree "chain"'
            )


def check_engine(vllm_config: VllmConfig, tree: Tree) -> None:
    """Refuse what only the whole engine's configuration shows, before any weight is loaded.

    Raises:
        ValueError: the engine has LoRA adapters; or the tree branches, and the engine quantises its KV cache or hands
            it on while a step runs.

    """
    # vLLM assigns adapters to the rows that the target computes; heads give its LM head and its embedding other ones.
    if vllm_config.lora_config is not None:
        raise ValueError(
            "speculative_config: method 'medusa' does not support LoRA adapters (enable_lora); merge an adapter "
            "into the target, or drop one of the two"
        )
    if not tree.branches:
        return
    dtype = vllm_config.cache_config.cache_dtype
    unsupported = {
        f"a quantised KV cache (kv_cache_dtype {dtype!r})": dtype not in CACHE_DTYPES[current_platform.device_type],
        "a KV connector (kv_transfer_config)": vllm_config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "micro-batches (enable_dbo)": vllm_config.parallel_config.use_ubatching,
    }
    for what, used in unsupported.items():
        if used:
            raise ValueError(
                f'medusa_tree: a branching tree does not work with {what}; drop it, or give medusa_tree "chain"'
            )
