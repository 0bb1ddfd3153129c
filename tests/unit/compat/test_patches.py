# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.compat.symbols import PATCHED

OBSERVE = """
import json
import pkgutil
from importlib import import_module

import vllm_medusa
from tests.patched import changes, standing

stock = standing()
modules = [module.name for module in pkgutil.walk_packages(vllm_medusa.__path__, "vllm_medusa.")]
modules = [name for name in modules if not name.startswith(("vllm_medusa.cli", "vllm_medusa.demo"))]
for name in modules:
    import_module(name)
imported = changes(stock)
vllm_medusa.plugin.register()
print("observed", json.dumps({"modules": modules, "imported": imported, "registered": changes(stock)}))
"""


@pytest.fixture(scope="module")
def observed() -> dict[str, Any]:
    """Places of vLLM that have changed in a process that imports the package and then registers the plugin."""
    done = subprocess.run(
        [sys.executable, "-c", OBSERVE],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "VLLM_PLUGINS": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("observed ")]
    found: dict[str, Any] = json.loads(line.removeprefix("observed "))
    return found


def test_importing_every_module_patches_nothing(observed: dict[str, Any]) -> None:
    assert {"vllm_medusa.runner.v1.sampling", "vllm_medusa.runner.v2.model_runner"} <= set(observed["modules"])
    assert observed["imported"] == []


def test_registering_patches_what_stays_for_the_process_and_nothing_else(observed: dict[str, Any]) -> None:
    assert observed["registered"] == [where for where, lifetime in PATCHED.items() if lifetime == "process"]
