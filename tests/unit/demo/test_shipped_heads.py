# SPDX-License-Identifier: Apache-2.0
"""The heads in the repository are whole and small."""

from __future__ import annotations

from pathlib import Path

from vllm_medusa.checkpoint.format import WEIGHTS_FILE, read_spec, read_state
from vllm_medusa.demo.places import HEADS

REPOSITORY = Path(__file__).parents[3]


def test_the_shipped_heads_are_complete_and_at_most_20_mb() -> None:
    spec = read_spec(REPOSITORY / HEADS)
    assert read_state(REPOSITORY / HEADS).keys() == spec.shapes().keys()
    assert spec.shared_lm_head
    assert (REPOSITORY / HEADS / WEIGHTS_FILE).stat().st_size <= 20_000_000
