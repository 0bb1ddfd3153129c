# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's graph managers capture on the CPU, where nothing else of a GPU is rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

from tests.rehearsal.graphs import RecordedGraph, record


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Let graphs that are captured in this context be recordings (see ``tests.rehearsal.graphs``)."""

    @contextmanager
    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "_global_graph_pool", (0, 0))
        patch.setattr(cudagraph_utils, "graph_capture", nothing)
        patch.setattr(cudagraph_utils, "capture_pool", nothing)
        patch.setattr(cudagraph_utils, "current_stream", lambda: None)
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", record)
        yield
