# SPDX-License-Identifier: Apache-2.0
"""What the tests of several ranks decode, and how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.parallel import Decoded


@pytest.fixture(scope="session")
def four_prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[:4]


@pytest.fixture(scope="session")
def alone(tiny_target: Path, tiny_heads: Path, four_prompts: list[list[int]]) -> Decoded:
    """What one rank with the tiny heads and a dynamic tree says."""
    from tests.e2e.parallel import decode

    return decode(tiny_target, tiny_heads, four_prompts, "dynamic")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep each of several ranks from compiling vLLM's lookup of embeddings, which one rank alone does not use."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
