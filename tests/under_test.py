# SPDX-License-Identifier: Apache-2.0
"""Which engine the integration tests run on: V1 and the CPU's attention, unless ``TEST_ENGINE`` says otherwise.

``TEST_ENGINE="v2"`` is vLLM's model runner V2, in Triton's interpreter; ``"v2 triton"`` adds the attention that GPUs
have, and ``"v2 triton async"`` asynchronous scheduling. ``"v2 cuda triton"`` and ``"v2 cuda flash"`` run the CUDA
worker with its warm-up and its graphs (see ``tests.rehearsal``). A process runs one engine under test from its start to
its end; ``tests/integration/test_v2.py`` starts those that are not V1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from unittest.mock import patch

Size = TypeVar("Size")


@dataclass(frozen=True)
class UnderTest:
    """The engine under test."""

    words: frozenset[str]

    @property
    def is_v2(self) -> bool:
        return "v2" in self.words

    def install(self) -> None:
        """Prepare the process, before anything imports vLLM."""
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(self.is_v2))
        if self.is_v2:
            from tests import triton_interpreter  # noqa: F401

    @contextmanager
    def medusa(self) -> Iterator[dict[str, Any]]:
        """Give engines that start in this context what the engine under test has, and further options for ``LLM``."""
        if "async" in self.words:
            _allow_async_scheduling()
        options: dict[str, Any] = {"async_scheduling": "async" in self.words}
        with ExitStack() as stack:
            if "cuda" in self.words:
                from tests.rehearsal.cuda_on_cpu import cuda_worker

                options |= stack.enter_context(cuda_worker())
            if "flash" in self.words:
                from tests.rehearsal.cuda_on_cpu import flash_attention

                stack.enter_context(flash_attention())
            if self.words & {"triton", "flash"}:
                stack.enter_context(_gpu_attention("flash" in self.words))
            yield options


UNDER_TEST = UnderTest(frozenset(os.environ.get("TEST_ENGINE", "v1").split()))


def on(v1: Size, v2: Size, triton: Size | None = None) -> Size:
    """Choose a test's size: an interpreted engine is many times slower than V1, and with Triton's attention more so."""
    if triton is not None and "triton" in UNDER_TEST.words:
        return triton
    return v2 if UNDER_TEST.is_v2 else v1


@contextmanager
def _gpu_attention(flash: bool) -> Iterator[None]:
    """Give every layer the attention that GPUs have: the CPU platform knows one backend, so that one is overridden."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_medusa.attention.triton import ops
    from vllm_medusa.attention.triton.flash_backend import TreeFlashAttentionBackend
    from vllm_medusa.attention.triton.triton_backend import TreeTritonAttentionBackend
    from vllm_medusa.compat.backends import overridden
    from vllm_medusa.kv_cache.kernel_commit import KernelCommit
    from vllm_medusa.runner.v2 import cpu_model_runner

    choose_tiling = ops.choose_tiling

    def choose_few_blocks(tokens: int, reqs: int, most: int, heads: int, kv_heads: int, *rest: Any, **own: Any) -> Any:
        """Give a program as many rows as it may have: the interpreter takes as long for few."""
        tiling = choose_tiling(tokens, reqs, most, heads, kv_heads, *rest, **own)
        rows = min(ops.next_power_of_2(most * heads // kv_heads), ops.MAX_BLOCK_ROWS)
        return replace(tiling, block_rows=max(tiling.block_rows, rows))

    # vLLM's cache-write kernel asks what its device can do before it chooses a tile.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    cpu_model_runner.MedusaModelRunner.tree_attention_selected = staticmethod(nullcontext)
    cpu_model_runner.MedusaModelRunner.commit_class = KernelCommit
    backend = TreeFlashAttentionBackend if flash else TreeTritonAttentionBackend
    with patch.object(ops, "choose_tiling", choose_few_blocks), overridden({AttentionBackendEnum.CPU_ATTN: backend}):
        yield


def _allow_async_scheduling() -> None:
    """Keep the CPU platform, which sees no use in it, from turning asynchronous scheduling off."""
    from vllm.platforms.cpu import CpuPlatform

    if hasattr(CpuPlatform, "allows_async_scheduling"):
        return
    check = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
    CpuPlatform.allows_async_scheduling = True
