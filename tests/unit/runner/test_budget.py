# SPDX-License-Identifier: Apache-2.0
"""Runners and their budgets: what ranks do together, and what keeps a budget from model runner V2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.config import CUDAGraphMode

from vllm_medusa.runner.v1.budget import StepBudget
from vllm_medusa.runner.v2.budget import lacking

SERVED: dict[str, Any] = {
    "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
    "return_sampling_mask": False,
    "enabled": False,
    "use_ubatching": False,
}


def config(**others: Any) -> Any:
    options = SERVED | others
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=options["cudagraph_mode"]),
        model_config=SimpleNamespace(return_sampling_mask=options["return_sampling_mask"]),
        aux_output_config=SimpleNamespace(enabled=options["enabled"]),
        parallel_config=SimpleNamespace(use_ubatching=options["use_ubatching"]),
    )


def test_an_engine_with_graphs_of_whole_decode_steps_can_have_one() -> None:
    assert lacking(config()) is None
    assert lacking(config(cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY)) is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cudagraph_mode": CUDAGraphMode.NONE}, "enforce_eager"),
        ({"cudagraph_mode": CUDAGraphMode.PIECEWISE}, "cudagraph_mode"),
        ({"return_sampling_mask": True}, "return_sampling_mask"),
        ({"enabled": True}, "enable_return_routed_experts"),
        ({"use_ubatching": True}, "enable_dbo"),
    ],
)
def test_what_an_engine_lacks_is_named(other: dict[str, Any], said: str) -> None:
    reason = lacking(config(**other))
    assert reason is not None
    assert said in reason


class SureBudget:
    """Levels may be left out at every step."""

    def least_parent(self, num_reqs: int) -> float:
        return 0.1 * num_reqs


@pytest.mark.parametrize(("num_ranks", "least"), [(1, 0.2), (2, 0.0)])
def test_only_a_single_rank_leaves_levels_out(num_ranks: int, least: float) -> None:
    budget: Any = SureBudget()
    step = StepBudget(budget, report=None, num_ranks=num_ranks)
    assert step.least_parent(np.array([True, False, True])) == pytest.approx(least)
