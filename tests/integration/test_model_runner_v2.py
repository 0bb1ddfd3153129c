"""Model runner V2, on a CPU through Triton's interpreter: the same tokens with trees as without speculation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def decode(**order: Any) -> dict[str, Any]:
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_PLUGINS": "medusa" if "heads" in order else ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.v2_process", json.dumps(order)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[:10]


@pytest.fixture(scope="module")
def plain(tiny_target: Path, prompts: list[list[int]]) -> dict[str, Any]:
    return decode(model=str(tiny_target), prompts=prompts)


@pytest.mark.parametrize("tree", ["chain", [3, 2, 1]])
def test_mixed_batches_emit_what_stock_v2_emits(
    tiny_target: Path, tiny_heads: Path, prompts: list[list[int]], plain: dict[str, Any], tree: str | list[int]
) -> None:
    found = decode(model=str(tiny_target), heads=str(tiny_heads), tree=tree, prompts=prompts)
    assert (plain["runner"], found["runner"]) == ("vllm.v1.worker.cpu.model_runner", "vllm_medusa.runner.v2")
    assert found["texts"] == plain["texts"]
    assert found["accepted"] > 10
    for ours, stock in zip(found["logprobs"], plain["logprobs"], strict=True):
        for mine, theirs in zip(ours, stock, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
