# SPDX-License-Identifier: Apache-2.0
"""Times on the device, and the rates that floors are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from gpu_bench.roofline import Rates

REPETITIONS = 10
FLOAT8 = "float8_e4m3fn"


def seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Return the median time of one of the calls, which run one after another, on a GPU from a CUDA graph."""
    calls[0]()
    if device.type == "cpu":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replayed_seconds(graph.replay) / len(calls)


def replayed_seconds(replay: Callable[[], object]) -> float:
    """Return the median time that the device takes for what a call starts."""
    times = []
    for repetition in range(REPETITIONS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        if repetition > 1:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_rates(dtypes: Sequence[str], copied_bytes: int, side: int, device: torch.device) -> Rates:
    """Measure a large copy and large products.

    Args:
        dtypes: of products.
        copied_bytes: how many a copy reads.
        side: of the square matrices.
        device: where.

    """
    return Rates(_copy_rate(copied_bytes, device), {dtype: _product_rate(dtype, side, device) for dtype in dtypes})


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)], device)


def _product_rate(dtype: str, side: int, device: torch.device) -> float:
    # Numbers at random: a device draws less power, and so is faster, where most bits are alike.
    left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    if dtype == FLOAT8:
        one = torch.ones((), device=device)
        taken = seconds(
            [lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)], device
        )
    else:
        output = torch.empty_like(left)
        taken = seconds([lambda: torch.mm(left, right, out=output)], device)
    return 2 * side**3 / taken
