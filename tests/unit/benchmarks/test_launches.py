# SPDX-License-Identifier: Apache-2.0
"""Launches are counted by the calls that the profiler has seen."""

from __future__ import annotations

from gpu_bench.launches import PROPOSAL, Call, Count, Launches, count_launches, launches_of


def test_graphs_are_told_from_launches_outside_and_proposals_from_the_rest() -> None:
    calls = [
        Call("cudaGraphLaunch", 0, 1),  # The target's.
        Call("cuLaunchKernelEx", 2, 3),
        Call("cudaStreamSynchronize", 3, 4),
        Call(PROPOSAL, 10, 20),
        Call("cudaLaunchKernel", 11, 12),
        Call("cudaMemcpyAsync", 12, 13),
        Call("cudaGraphLaunch", 14, 15),
        Call("cudaLaunchKernelExC_v11060", 19, 30),
        Call("cudaMemsetAsync", 20, 21),
        Call("Memcpy DtoD (Device -> Device)", 12, 13),
        Call("aten::copy_", 12, 13),
    ]
    assert count_launches(calls, steps=1) == Launches(step=Count(2, 5), proposal=Count(1, 3))
    assert count_launches(calls, steps=2) == Launches(step=Count(1, 2.5), proposal=Count(0.5, 1.5))


def test_without_cuda_nothing_is_launched() -> None:
    ran: list[bool] = []
    assert launches_of(lambda: ran.append(True), steps=1) == Launches(Count(0, 0), Count(0, 0))
    assert ran == [True]
