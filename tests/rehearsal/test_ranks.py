# SPDX-License-Identifier: Apache-2.0
"""Two ranks of the CUDA worker, with graphs and a budget, say what one says without either."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from vllm.v1.executor import multiproc_executor

from tests.e2e.parallel import no_process_left
from tests.integration.engines import generate, greedy, spec_counters, texts
from tests.rehearsal.test_budget import SEVERAL, TOKENS, Plain, fixed_costs, plain, rehearsed

pytestmark = pytest.mark.both_runners

__all__ = ["plain"]


def test_two_ranks_verify_the_same_nodes(
    plain: Plain, tiny_target: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands in for the GPU is in this process, so the ranks are forked from it.
    monkeypatch.setattr(multiproc_executor, "get_mp_context", lambda: multiprocessing.get_context("fork"))
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with (
        no_process_left(),
        fixed_costs(SEVERAL),
        rehearsed(tiny_target, tiny_heads, "dynamic", "auto", **ranks) as llm,
    ):
        found = texts(generate(llm, plain.prompts, greedy(TOKENS)))
        counted = spec_counters(llm)
    assert found == plain.greedy
    assert counted.accepted > 0
