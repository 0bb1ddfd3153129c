# SPDX-License-Identifier: Apache-2.0
"""What the host launches on the device: CUDA graphs, and kernels, copies and fills outside of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROPOSAL = "medusa proposal"
"""The profiler's name for what a step drafts with."""

GRAPH = re.compile(r"cu(da)?GraphLaunch")
OTHER = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|Memcpy|Memset)")
"""Calls of CUDA's runtime and, by Triton, of its driver, whatever their suffix."""


@dataclass(frozen=True)
class Count:
    """Launches.

    Attributes:
        graphs: CUDA graphs.
        outside: kernels, copies and fills outside of graphs.

    """

    graphs: float
    outside: float


@dataclass(frozen=True)
class Launches:
    """Launches of a step.

    Attributes:
        step: all of them.
        proposal: those of the proposal.

    """

    step: Count
    proposal: Count


@dataclass(frozen=True)
class Call:
    """A call that the profiler has seen on the host; times are in its own unit."""

    name: str
    start: float
    end: float


def launches_of(run: Callable[[], Any], steps: int) -> Launches:
    """Run so many steps and count the launches of one."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
    events = profiler.events() or []
    return count_launches([Call(event.name, event.time_range.start, event.time_range.end) for event in events], steps)


def count_launches(calls: Iterable[Call], steps: int) -> Launches:
    """Count the launches of one of so many steps, and those within proposals."""
    calls = list(calls)
    proposals = [call for call in calls if call.name == PROPOSAL]
    within = [call for call in calls if any(each.start <= call.start < each.end for each in proposals)]
    return Launches(_count(calls, steps), _count(within, steps))


def _count(calls: list[Call], steps: int) -> Count:
    graphs = sum(bool(GRAPH.match(call.name)) for call in calls)
    outside = sum(bool(OTHER.match(call.name)) for call in calls)
    return Count(graphs / steps, outside / steps)
