# SPDX-License-Identifier: Apache-2.0
"""What keeps a budget from model runner V2 is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

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
