# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from tests.unit.engine_configs import Models
from vllm_medusa.capture_sizes import CAPTURE_SPACING, MAX_CAPTURED_ROWS


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def sizes_chosen(models: Models, options: dict[str, Any], given: list[int] | None = None, **engine: Any) -> list[int]:
    """The sizes of CUDA graphs, as on a device that has them."""
    config = models.configure(options, **engine)
    compilation = config.compilation_config
    config.model_config.enforce_eager = False
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.compile_sizes, compilation.cudagraph_capture_sizes = None, given
    compilation.max_cudagraph_capture_size = given[-1] if given else None
    config._set_cudagraph_sizes()
    assert compilation.max_cudagraph_capture_size == compilation.cudagraph_capture_sizes[-1]
    return list(compilation.cudagraph_capture_sizes)


@pytest.mark.parametrize(
    ("rows", "max_num_seqs", "largest"),
    [(32, 256, 2048), (32, 40, 1280), (8, 256, 2048), (5, 1024, 2045), (8, 32, 512)],
)
def test_decode_steps_are_captured_to_a_bound_with_little_padding(
    models: Models, rows: int, max_num_seqs: int, largest: int
) -> None:
    tree = [[token] for token in range(rows - 1)]
    sizes = sizes_chosen(models, {"medusa_tree": tree}, max_num_seqs=max_num_seqs, max_num_batched_tokens=8192)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest <= MAX_CAPTURED_ROWS
    further = [size for size in sizes if size > 512]
    assert all(size % rows == 0 for size in further)
    assert len(further) <= 16
    for requests in range(512 // rows + 1, largest // rows + 1):
        padded = next(size for size in sizes if size >= requests * rows)
        assert padded - requests * rows <= max(requests * rows / CAPTURE_SPACING, rows)


def test_no_step_is_captured_that_the_scheduler_cannot_make(models: Models) -> None:
    tree = [[token] for token in range(31)]
    assert sizes_chosen(models, {"medusa_tree": tree}, max_num_seqs=256, max_num_batched_tokens=1000)[-1] == 31 * 32


def test_capture_sizes_that_the_user_gives_stay(models: Models) -> None:
    assert sizes_chosen(models, {"medusa_tree": [2]}, given=[8, 64], max_num_seqs=256) == [8, 64]
