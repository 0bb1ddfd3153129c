# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from vllm.v1 import structured_output

from vllm_medusa.compat.patches import manage_structured_output
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


class Manager:
    """Stands in the place of vLLM's manager of structured output."""

    def __init__(self, vllm_config: str) -> None:
        self.made_of: tuple[str, ...] = (vllm_config,)


class OfMedusa(Manager):
    pass


class OfOthers(Manager):
    def __init__(self, vllm_config: str, further: str, *, named: str) -> None:
        self.made_of = vllm_config, further, named


def test_only_vllms_own_manager_of_structured_output_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "StructuredOutputManager", Manager)
    monkeypatch.setattr(Manager, "__new__", object.__new__)
    manage_structured_output(lambda vllm_config: OfMedusa if vllm_config == "medusa" else None)  # type: ignore[return-value,arg-type]
    assert type(Manager("plain")) is Manager
    made = Manager("medusa")
    assert (type(made), made.made_of) == (OfMedusa, ("medusa",))
    others = OfOthers("medusa", "further", named="named")
    assert (type(others), others.made_of) == (OfOthers, ("medusa", "further", "named"))
    for each in (Manager("plain"), made, others):
        for same in (copy(each), pickle.loads(pickle.dumps(each))):
            assert (type(same), same.made_of) == (type(each), each.made_of)


def test_whoever_makes_managers_of_structured_output_beforehand_makes_them_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    def theirs(cls: type[Manager], *args: Any) -> Manager:
        asked.append((cls, *args))
        return object.__new__(cls)

    monkeypatch.setattr(structured_output, "StructuredOutputManager", Manager)
    monkeypatch.setattr(Manager, "__new__", theirs)
    manage_structured_output(lambda vllm_config: OfMedusa if vllm_config == "medusa" else None)  # type: ignore[return-value,arg-type]
    assert (Manager("plain").made_of, Manager("medusa").made_of) == (("plain",), ("medusa",))
    assert asked == [(Manager, "plain"), (OfMedusa, "medusa")]
