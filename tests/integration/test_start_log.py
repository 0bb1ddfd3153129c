# SPDX-License-Identifier: Apache-2.0
"""An engine's log says in one line what it decodes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import engine
from vllm_medusa.runner import start_log


def test_the_log_says_once_what_is_active(tiny_target: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def info_once(message: str, *args: Any, scope: str) -> None:
        assert scope == "global"
        lines.append(message % args)

    # vLLM resets the handlers and the level of its loggers as an engine starts.
    monkeypatch.setattr(start_log.logger, "info_once", info_once)
    with engine(tiny_target, heads=tiny_heads, tree=[3, 1, 1]):
        [line] = lines
    for said in ("model runner V1", "attention TreeCPUAttentionBackend", "tree of 9 nodes, 3 deep", "exact acceptance"):
        assert said in line
    assert line.endswith(f"4 heads of {tiny_heads}")
