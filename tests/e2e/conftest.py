# SPDX-License-Identifier: Apache-2.0
"""What files of tests share: a server, and what several ranks decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.parallel import Decoded
    from tests.e2e.server import Server


@pytest.fixture(scope="package")
def chat_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with a chat template."""
    from tests.integration.distillation import write_chat_target

    return write_chat_target(tiny_target, tmp_path_factory.mktemp("chat") / "target")


@pytest.fixture(scope="package")
def server(chat_target: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose every draft has 15 nodes: what a budget verifies depends on how busy the machine is."""
    from tests.e2e.server import serve

    medusa = {"method": "medusa", "model": str(tiny_heads), "medusa_tree": "dynamic", "medusa_budget": "off"}
    with serve(chat_target, medusa | {"num_speculative_tokens": 15}, tmp_path_factory.mktemp("serve")) as server:
        yield server


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
