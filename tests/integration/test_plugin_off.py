# SPDX-License-Identifier: Apache-2.0
"""An engine that does not ask for Medusa is stock vLLM, whether the plugin is loaded or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import engine, generate, greedy, model_runner, spec_counters, texts
from tests.patched import changes, standing
from vllm_medusa.plugin import register

ROOT = Path(__file__).parents[2]


def observe(model: str | Path, prompts: list[list[int]]) -> dict[str, Any]:
    """What a plain engine is made of, and what it says."""
    from vllm.engine.arg_utils import EngineArgs

    with engine(model) as llm:
        runner = model_runner(llm)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        layers = runner.compilation_config.static_forward_context.values()
        return {
            "plugin": hasattr(EngineArgs.create_speculative_config, "knows_medusa"),
            "classes": sorted({named(type(part)) for part in (worker, runner, runner.sampler)}),
            "attention": sorted({named(layer.attn_backend) for layer in layers if hasattr(layer, "attn_backend")}),
            "implementation": sorted({named(type(layer.impl)) for layer in layers if hasattr(layer, "impl")}),
            "builders": sorted(
                {named(type(builder)) for group in runner._attn_group_iterator() for builder in group.metadata_builders}
            ),
            "tokens": texts(generate(llm, prompts, greedy(32))),
            "drafts": spec_counters(llm).drafts,
        }


def named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@pytest.fixture(scope="module")
def prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[:6]


@pytest.fixture(scope="module")
def observed(tiny_target: Path, prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """What plain engines in processes of their own are, by the value of VLLM_PLUGINS."""
    code = (
        "import json, sys; from tests.integration.test_plugin_off import observe;"
        "print('observed', json.dumps(observe(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps([str(tiny_target), prompts])]
    processes = {
        plugins: subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "VLLM_PLUGINS": plugins}, stdout=subprocess.PIPE, text=True
        )
        for plugins in ("", "medusa")
    }
    found = {}
    for plugins, process in processes.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        [line] = [line for line in output.splitlines() if line.startswith("observed ")]
        found[plugins] = json.loads(line.removeprefix("observed "))
    return found


def test_an_engine_without_medusa_is_the_same_with_and_without_the_plugin(
    observed: dict[str, dict[str, Any]],
) -> None:
    without, with_plugin = observed[""], observed["medusa"]
    assert (without.pop("plugin"), with_plugin.pop("plugin")) == (False, True)
    assert with_plugin == without
    assert all(name.startswith("vllm.") for name in without["classes"] + without["attention"])


def test_a_plain_engine_after_a_medusa_engine_in_one_process_is_stock(
    tiny_target: Path, tiny_heads: Path, prompts: list[list[int]], observed: dict[str, dict[str, Any]]
) -> None:
    with engine(tiny_target, heads=tiny_heads, tree=[3, 2]) as llm:
        assert named(type(model_runner(llm))).startswith("vllm_medusa.")
        speculated = texts(generate(llm, prompts, greedy(32)))
        assert spec_counters(llm).accepted > 0
    stock = observe(tiny_target, prompts)
    assert stock.pop("plugin")
    assert stock == {key: value for key, value in observed[""].items() if key != "plugin"}
    assert speculated == stock["tokens"]


@pytest.mark.both_runners
def test_an_engine_with_medusa_leaves_nothing_patched(
    tiny_target: Path, tiny_heads: Path, prompts: list[list[int]]
) -> None:
    register()
    before = standing()
    with engine(tiny_target, heads=tiny_heads, tree=[3, 2]) as llm:
        assert changes(before) == []
        assert generate(llm, prompts[:1], greedy(4))
    assert changes(before) == []
