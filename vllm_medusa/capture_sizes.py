# SPDX-License-Identifier: Apache-2.0
"""In which sizes decode steps of trees are captured as CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_CAPTURED_ROWS = 2048
"""Rows of the largest decode step that is captured as a CUDA graph where the user gives no sizes. So large a step keeps
the device busy for longer than the host takes to launch it, and each graph costs memory and seconds of the start."""

CAPTURE_SPACING = 8
"""Sizes above vLLM's own lie an eighth apart: padding to the next size adds no more than that to a step."""


def further_capture_sizes(vllm_config: VllmConfig) -> list[int]:
    """Return in which sizes, besides vLLM's, CUDA graphs of decode steps are to be captured: tokens, ascending.

    vLLM's own sizes stop at 512 tokens (1024 on some devices), which is 16 requests of 32 rows.
    """
    rows, sizes = vllm_config.uniform_decode_query_len, vllm_config.compilation_config.cudagraph_capture_sizes
    if not sizes:
        return []
    scheduler = vllm_config.scheduler_config
    most = min(scheduler.max_num_seqs, min(MAX_CAPTURED_ROWS, scheduler.max_num_batched_tokens) // rows)
    requests, further = sizes[-1] // rows, []
    while requests < most:
        requests = min(requests + max(requests // CAPTURE_SPACING, 1), most)
        further.append(requests * rows)
    return further
