# SPDX-License-Identifier: Apache-2.0
"""What is said of speculation counts nodes as nodes, and says nothing where there is none."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tests.unit.engine_configs import LLAMA, Models
from vllm_medusa import metrics
from vllm_medusa.metrics import MedusaStatLogger


def drafts(*each: tuple[int, int], most: int = 7) -> SpecDecodingStats:
    """Statistics of drafts of so many nodes, of which so many were accepted."""
    stats = SpecDecodingStats.new(most)
    for nodes, accepted in each:
        stats.observe_draft(nodes, accepted)
    return stats


def iteration(steps: int, stats: SpecDecodingStats | None) -> tuple[Any, Any]:
    return SimpleNamespace(spec_decoding_stats=stats), SimpleNamespace(inter_token_latencies_iter=[0.1] * steps)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logged: list[str] = []
    monkeypatch.setattr(metrics.logger, "info", logged.append)
    return logged


def test_a_line_tells_tokens_nodes_and_depths_of_the_steps_since_the_last_one(tmp_path: Path, lines: list[str]) -> None:
    logger = MedusaStatLogger(Models(tmp_path).configure({}))
    logger.record(*iteration(3, drafts((7, 2), (5, 0))))
    logger.record(*iteration(1, None))
    logger.record(None, None)
    logger.log()
    logger.log()
    assert lines == [
        "Medusa: 1.50 tokens per step, 3.0 nodes verified for them, 50% of steps without a draft; drafts accepted to "
        "depth 1, 2, ...: 0.50, 0.50"
    ]


def test_counters_are_of_the_model_and_the_engine(tmp_path: Path) -> None:
    config = Models(tmp_path).configure({})
    logger = MedusaStatLogger(config, engine_index=3)
    labels = {"model_name": str(config.model_config.served_model_name), "engine": "3"}
    logger.record(*iteration(2, drafts((7, 2), (5, 1))))
    values = {
        name: REGISTRY.get_sample_value(f"medusa:{name}_total", labels)
        for name in ("steps", "drafted_steps", "verified_nodes")
    }
    assert values == {"steps": 2, "drafted_steps": 2, "verified_nodes": 12}
    depths = [REGISTRY.get_sample_value("medusa:accepted_nodes_total", {**labels, "depth": str(d)}) for d in (1, 2, 3)]
    assert depths == [2, 1, None]


def test_an_engine_without_medusa_has_neither_line_nor_counter(tmp_path: Path, lines: list[str]) -> None:
    plain = Models(tmp_path).start({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}, LLAMA)
    logger = MedusaStatLogger(plain, engine_index=9)
    logger.record(*iteration(2, drafts((2, 1), most=2)))
    logger.log()
    assert not lines
    labels = {"model_name": str(plain.model_config.served_model_name), "engine": "9"}
    assert REGISTRY.get_sample_value("medusa:steps_total", labels) is None


def test_vllm_finds_the_logger() -> None:
    [found] = [each for each in entry_points(group="vllm.stat_logger_plugins") if each.name == "medusa"]
    assert found.load() is MedusaStatLogger
