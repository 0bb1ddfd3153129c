# SPDX-License-Identifier: Apache-2.0
"""The engine's tests once more on vLLM's model runner V2, each kind of engine in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

RUNS = {
    "v2 triton async": [
        "test_launches.py",
        "test_exactness.py",
        "test_dynamic_trees.py",
    ],
    "v2 cuda triton": ["../rehearsal/test_cuda_worker.py", "../rehearsal/test_budget.py"],
    "v2": [
        "test_acceptance.py",
        "test_exactness.py",
        "test_sampling.py",
        "test_logprobs.py",
        "test_worker_life.py",
        "test_proposal_graphs.py",
        "test_lookup.py",
        "test_budget.py",
        "test_plugin_off.py",
        "../unit/refusals/test_refusals.py",
    ],
    "v2 cuda flash async": [
        "../rehearsal/test_graphs.py",
        "../rehearsal/test_cuda_worker.py",
        "../rehearsal/test_budget.py",
        "../rehearsal/test_ranks.py",
    ],
    "v2 async": ["test_scheduler_life.py", "test_sequential_heads.py"],
}
"""For each engine (see ``tests.under_test``), the files whose tests hold on both runners; what takes longest first."""


@pytest.mark.parametrize("engine", RUNS)
def test_what_holds_on_v1_holds_on_v2(engine: str) -> None:
    files = [str(Path(__file__).parent / file) for file in RUNS[engine]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "both_runners", *files],
        cwd=REPOSITORY,
        env=os.environ | {"TEST_ENGINE": engine},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-1000:]
