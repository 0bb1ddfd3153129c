# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import vllm_medusa

ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_distribution() -> None:
    assert vllm_medusa.__version__ == version("vllm-medusa")


def test_every_source_file_names_its_licence() -> None:
    files = [
        file for room in ("vllm_medusa", "tests", "benchmarks", "examples") for file in (ROOT / room).rglob("*.py")
    ]
    unnamed = [
        file for file in files if (text := file.read_text()) and not text.startswith("# SPDX-License-Identifier")
    ]
    assert files
    assert unnamed == []


def test_sources_that_a_users_machine_compiles_are_in_the_wheel() -> None:
    package = ROOT / "vllm_medusa"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vllm_medusa"]
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    sources = set(package.rglob("*.cpp"))
    assert sources
    assert sources <= packaged
