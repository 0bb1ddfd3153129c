# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's CUDA worker live on a CPU: stand-ins for what a GPU gives it, and for nothing else.

Kernels run in Triton's interpreter, which ``tests.triton_interpreter`` has set up. Streams, events and pinned memory
are vLLM's own stand-ins for CPUs. A CUDA graph is what ``tests.rehearsal.graphs`` records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


class TimedEvent:
    """A CUDA event on a device that does everything at once: the time at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: TimedEvent) -> float:
        return 1000 * (end.seconds - self.seconds)


MEMORY = 1 << 30
"""Bytes that the worker is told to be there and free."""


@contextmanager
def flash_attention() -> Iterator[None]:
    """Give vLLM's FlashAttention backend the functions that its library has on a GPU."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    from tests.rehearsal import flash_attention as stand_in

    functions = {
        "flash_attn_varlen_func": stand_in.flash_attn_varlen_func,
        "get_flash_attn_version": stand_in.get_flash_attn_version,
        "get_scheduler_metadata": stand_in.get_scheduler_metadata,
        "reshape_and_cache_flash": triton_reshape_and_cache_flash,
    }
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(flash_attn, name, function, create=True))
        yield


@contextmanager
def cuda_worker() -> Iterator[dict[str, Any]]:
    """Make engines that start in this context run ``MedusaGPUWorker``; yields options for ``LLM``.

    What of the worker's life is left out: torch.compile and with it piecewise graphs, the tuning of CUDA libraries
    (``kernel_warmup``), NCCL.
    """
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.cpu import shm  # noqa: F401
    from vllm.v1.worker.gpu import cudagraph_utils

    from tests.rehearsal.graphs import RecordedGraph, record
    from vllm_medusa import config

    class Platform(CpuPlatform):
        """The CPU, where the worker and its graphs ask what CUDA can do."""

        _global_graph_pool: object | None = None

        def is_cuda_alike(self) -> bool:
            return True

        def check_if_supports_dtype(self, dtype: torch.dtype) -> None: ...

        def logical_device_id_to_visible_device_id(self, index: int) -> int:
            return index

        def graph_pool_handle(self) -> object:
            return object()

        def get_global_graph_pool(self) -> object:
            if Platform._global_graph_pool is None:
                Platform._global_graph_pool = object()
            return Platform._global_graph_pool

    @contextmanager
    def capture_of_group(group: Any, context: Any) -> Iterator[Any]:
        """Let a group of ranks capture as one rank does: what joins them here needs no preparation, as NCCL does."""
        yield context

    def check_and_update_config(vllm_config: Any) -> None:
        scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
        wanted = scheduler.async_scheduling, compilation.cudagraph_capture_sizes
        stock_check(vllm_config)
        scheduler.async_scheduling, compilation.cudagraph_capture_sizes = wanted

    def init_worker(worker: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(worker, *args, **kwargs)
        worker.device_config = SimpleNamespace(device_type="cuda", device="cuda")

    stock_check, stock_init = CpuPlatform.check_and_update_config, gpu_worker.Worker.__init__
    accelerator = {
        "device_count": lambda: 2,
        "get_memory_info": lambda *_: (MEMORY, MEMORY),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "set_device_index": lambda *_: None,
    }
    with ExitStack() as stack:
        for name, value in accelerator.items():
            stack.enter_context(patch.object(torch.accelerator, name, value))
        stack.enter_context(patch.object(torch.cuda, "Event", TimedEvent))
        stack.enter_context(patch.object(torch.cuda, "CUDAGraph", RecordedGraph))
        stack.enter_context(patch.object(torch.cuda, "graph", record))
        stack.enter_context(patch.object(torch.cuda.memory, "get_allocator_backend", lambda: "none"))
        stack.enter_context(patch.object(gpu_worker, "torch", _torch_with_devices_on_the_cpu()))
        stack.enter_context(patch.object(gpu_worker, "current_platform", Platform()))
        stack.enter_context(patch.object(cudagraph_utils, "current_platform", Platform()))
        stack.enter_context(patch.object(GroupCoordinator, "graph_capture", capture_of_group))
        stack.enter_context(patch.object(gpu_worker, "kernel_warmup", lambda worker: None))
        stack.enter_context(patch.object(gpu_worker.Worker, "__init__", init_worker))
        stack.enter_context(patch.object(CpuPlatform, "support_static_graph_mode", lambda *_: True))
        # Layers call attention directly, not through an operator that would hide from a graph what it does.
        stack.enter_context(patch.object(CpuPlatform, "opaque_attention_op", lambda *_: False))
        stack.enter_context(patch.object(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config)))
        stack.enter_context(patch.dict(config.WORKERS, cpu=config.WORKERS["cuda"]))
        yield {
            "enforce_eager": False,
            "gpu_memory_utilization": 0.5,
            "kv_cache_memory_bytes": None,
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        }


def _torch_with_devices_on_the_cpu() -> ModuleType:
    """Return torch, but for a ``device`` that is the CPU whatever is asked for."""

    class Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    module = Torch("torch")
    module.device = lambda *_: torch.device("cpu")  # type: ignore[attr-defined]
    return module
