# SPDX-License-Identifier: Apache-2.0
"""What files of tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.test_dynamic_trees import Plain


@pytest.fixture(scope="session")
def plain(tiny_target: Path, held_out_prompts: list[list[int]]) -> Plain:
    """What stock vLLM says where trees of changing shapes and lengths are to say the same."""
    from tests.integration.test_dynamic_trees import Plain

    return Plain(tiny_target, held_out_prompts)
