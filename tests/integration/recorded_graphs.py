# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs on a CPU: operations are recorded, and replayed on the very tensors they were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils


class RecordedGraph(TorchDispatchMode):
    """As a CUDA graph, it knows tensors by where they lie, and nothing of what the host does between operations."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views too: some, such as aten.reshape, copy where they must.
        self._operations.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self._operations:
            for place, tensor in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Let vLLM's graph managers record on the CPU."""

    @contextmanager
    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "_global_graph_pool", (0, 0))
        patch.setattr(cudagraph_utils, "graph_capture", nothing)
        patch.setattr(cudagraph_utils, "capture_pool", nothing)
        patch.setattr(cudagraph_utils, "current_stream", lambda: None)
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", lambda graph, *args, **kwargs: graph)
        yield
