"""What the tests of several ranks compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.parallel import Decoded, decode


@pytest.fixture(scope="session")
def four_prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[:4]


@pytest.fixture(scope="session")
def on_one_rank(tiny_target: Path, tiny_heads: Path, four_prompts: list[list[int]]) -> Decoded:
    """What an engine of one rank says; its heads guess right now and then, so that a branching walk is compared."""
    decoded = decode(tiny_target, tiny_heads, four_prompts)
    assert decoded.counters.accepted > 0
    return decoded
