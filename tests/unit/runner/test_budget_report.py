# SPDX-License-Identifier: Apache-2.0
"""A worker says what its budget did, in its log and through Prometheus' client of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.config import VllmConfig

from tests.unit.engine_configs import Models
from vllm_medusa.budget.tally import Tally
from vllm_medusa.runner import budget_report
from vllm_medusa.runner.budget_report import BudgetReport


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def config(tmp_path: Path) -> VllmConfig:
    return Models(tmp_path).configure({})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logged: list[str] = []
    monkeypatch.setattr(budget_report.logger, "info", logged.append)
    return logged


def tally() -> Tally:
    made = Tally()
    made.began(2)
    made.began(2)
    made.asked_for(12)
    made.chose(6)
    made.verified(np.array([0.9, 0.94, 0.31], dtype=np.float32), np.array([True, False, True]))
    return made


def test_a_line_tells_budget_and_probabilities_when_it_is_time(config: VllmConfig, lines: list[str]) -> None:
    clock = Clock()
    report, counted = BudgetReport(config, log=True, clock=clock), tally()
    report.report(counted)
    assert not lines
    clock.now += 10
    report.report(counted)
    report.report(counted)
    clock.now += 10
    report.report(counted)
    assert lines == [
        "Medusa: budget of 3.0 nodes in a step of 2.0 requests, of 6.0 drafted; heads asked in 50% of steps; "
        "probability of nodes, expected and accepted: 0.31 1.00, 0.92 0.50"
    ]


def test_counters_are_of_the_engine_and_there_is_no_line_without_statistics(
    config: VllmConfig, lines: list[str]
) -> None:
    clock = Clock()
    labels = {"model_name": str(config.model_config.served_model_name), "engine": "0"}
    report = BudgetReport(config, log=False, clock=clock)

    def read() -> list[float]:
        names = ("budget_steps", "budget_asked_steps", "budget_requests", "budget_drafted_nodes", "budget_chosen_nodes")
        return [REGISTRY.get_sample_value(f"medusa:{name}_total", labels) or 0 for name in names]

    before = read()
    clock.now += 10
    report.report(tally())
    assert [now - old for now, old in zip(read(), before, strict=True)] == [2, 1, 4, 12, 6]
    bins = {**labels, "probability": "0.9-1.0"}
    found = [
        REGISTRY.get_sample_value(f"medusa:predicted_nodes{what}_total", bins)
        for what in ("", "_expected", "_accepted")
    ]
    assert found == [2, pytest.approx(1.84), 1]
    assert not lines


def test_another_process_reads_the_counters_where_prometheus_gathers_several(tmp_path: Path) -> None:
    gathered = tmp_path / "gathered"
    gathered.mkdir()
    script = (
        "from types import SimpleNamespace as Of\n"
        "from vllm_medusa.runner.budget_report import Counters\n"
        "from vllm_medusa.budget.tally import Tally\n"
        "tally = Tally()\n"
        "tally.began(3)\n"
        "model, parallel = Of(served_model_name='tiny'), Of(data_parallel_index=2)\n"
        "Counters.of(Of(model_config=model, parallel_config=parallel)).add(tally)\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(gathered)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(gathered))
    labels = {"model_name": "tiny", "engine": "2"}
    assert registry.get_sample_value("medusa:budget_requests_total", labels) == 3


@pytest.mark.parametrize("disabled", [False, True])
def test_workers_know_whether_the_engine_logs_statistics(tmp_path: Path, disabled: bool) -> None:
    assert Models(tmp_path).medusa({}, disable_log_stats=disabled).log_stats is not disabled
