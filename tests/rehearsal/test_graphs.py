# SPDX-License-Identifier: Apache-2.0
"""The stand-in for CUDA graphs finds what a real graph would get wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.rehearsal.graphs import RecordedGraph, record

pytestmark = pytest.mark.both_runners


@triton.jit
def add_kernel(into_ptr, value_ptr, number, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(into_ptr + place, tl.load(value_ptr + place) + number)


@pytest.fixture(autouse=True)
def inference() -> None:
    with torch.inference_mode():
        yield


def test_a_replay_computes_anew_from_what_its_inputs_hold_now() -> None:
    graph, source, result = RecordedGraph(), torch.ones(4), torch.zeros(4)
    with record(graph):
        result.copy_((source * 2).view(2, 2).flatten() + 1)
    source.fill_(10)
    graph.replay()
    assert result.tolist() == [21] * 4
    assert (graph.replays, graph.launches) == (1, 3)


def test_a_launch_is_replayed_with_the_numbers_of_its_capture() -> None:
    graph, source, result, number = RecordedGraph(), torch.ones(4), torch.zeros(4), 5.0
    with record(graph):
        add_kernel[(1,)](result, source, number, size=4)
    source.fill_(2)
    number = 100.0
    graph.replay()
    assert result.tolist() == [7] * 4
    assert (number, graph.launches) == (100, 1)


def test_what_is_kept_of_a_capture_holds_the_replays_result() -> None:
    graph, source = RecordedGraph(), torch.ones(4)
    with record(graph):
        kept = source + 1
    source.fill_(4)
    graph.replay()
    assert kept.tolist() == [5] * 4


def test_memory_that_only_the_graph_knows_holds_noise() -> None:
    graph, source, result = RecordedGraph(), torch.ones(4), torch.zeros(4)
    with record(graph):
        buffer = torch.empty(4)
        buffer[:2] = source[:2]
        result.copy_(buffer)
        del buffer
    graph.replay()
    assert result[:2].tolist() == [1, 1]
    assert result[2:].isnan().all()


def test_memory_that_was_freed_since_the_capture_is_found() -> None:
    graph, source, result = RecordedGraph(), torch.ones(4), torch.zeros(4)
    with record(graph):
        result.copy_(source)
    del source
    with pytest.raises(AssertionError, match="16 bytes that were freed after its capture"):
        graph.replay()


def test_waiting_for_the_device_in_a_capture_is_refused() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), record(RecordedGraph()):
        torch.ones(1).item()
