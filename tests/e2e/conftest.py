# SPDX-License-Identifier: Apache-2.0
"""What the tests of several ranks decode."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def four_prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[:4]
