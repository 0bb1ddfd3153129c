# SPDX-License-Identifier: Apache-2.0
"""Two ranks on one machine, vLLM's multiprocessing executor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.parallel import Decoded, decode, no_process_left

pytestmark = pytest.mark.usefixtures("uncompiled")


def test_two_ranks_say_what_one_says_and_grow_the_same_trees(
    tiny_target: Path, tiny_sequential_heads_with_lookup: Path, four_prompts: list[list[int]]
) -> None:
    alone = decode(tiny_target, tiny_sequential_heads_with_lookup, four_prompts, "dynamic")
    assert alone.counters.accepted > 0
    with no_process_left():
        together = decode(
            tiny_target,
            tiny_sequential_heads_with_lookup,
            four_prompts,
            "dynamic",
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
        )
    assert together == alone


def test_ranks_with_a_budget_measure_together_and_say_what_one_says(
    tiny_target: Path,
    tiny_heads: Path,
    alone: Decoded,
    four_prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with no_process_left():
        together = decode(
            tiny_target,
            tiny_heads,
            four_prompts,
            "dynamic",
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            speculative_config={"medusa_budget": "auto"},
        )
    assert (together.greedy, together.seeded) == (alone.greedy, alone.seeded)
    assert len(list((tmp_path / "medusa" / "costs").iterdir())) == 1
