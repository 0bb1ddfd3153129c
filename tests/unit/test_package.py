# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

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
