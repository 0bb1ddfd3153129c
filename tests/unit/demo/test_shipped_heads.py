# SPDX-License-Identifier: Apache-2.0
"""The heads in the repository are whole and small."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_medusa.checkpoint.format import WEIGHTS_FILE, read_spec, read_state
from vllm_medusa.demo.places import HEADS, NATIVE_HEADS

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("heads", [HEADS, NATIVE_HEADS], ids=["sequential", "plain"])
def test_the_shipped_heads_are_complete_and_at_most_20_mb(heads: Path) -> None:
    spec = read_spec(REPOSITORY / heads)
    assert read_state(REPOSITORY / heads).keys() == spec.shapes().keys()
    assert spec.shared_lm_head
    assert (spec.path_rank is None) == (heads == NATIVE_HEADS)
    assert (REPOSITORY / heads / WEIGHTS_FILE).stat().st_size <= 20_000_000
