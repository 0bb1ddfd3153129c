# SPDX-License-Identifier: Apache-2.0
"""vLLM refuses Ray on CPUs, because its CPU platform names no device for Ray to count; for tests this names one."""

from __future__ import annotations


def allow() -> None:
    """Let Ray count "GPUs" for a CPU engine; runs in the driver and first thing in every Ray worker."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"
