# SPDX-License-Identifier: Apache-2.0
"""Other tilings of the attention kernel than the one that it chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch


def tried() -> Iterator[str]:
    """Let the kernel use one tiling after the other while the caller holds its name; the first is its own choice."""
    from vllm_medusa.attention.triton import ops
    from vllm_medusa.attention.triton.tiling import choose_tiling

    yield "as chosen"
    for tile, splits, warps, stages in product((32, 64, 128), (1, 2), (4, 8), (3, 4, 5)):

        def chosen(*args: Any, divisor: int = splits, **kwargs: Any) -> Any:
            own = choose_tiling(*args, **kwargs)
            return replace(own, tile=tile, splits=max(own.splits // divisor, 1), warps=warps, stages=stages)  # noqa: B023

        with patch.object(ops, "choose_tiling", chosen):
            yield f"tile {tile}, splits / {splits}, {warps} warps, {stages} stages"
