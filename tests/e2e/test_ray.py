# SPDX-License-Identifier: Apache-2.0
"""Two ranks in two Ray workers: the plugin loads in processes that vLLM did not start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import ray_on_cpu
from tests.e2e.parallel import Decoded, decode, no_process_left

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'vllm-medusa[ray]')")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_devices(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of this machine that believes in two GPUs."""
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Else the workers give way to all that runs beside them.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr(CpuPlatform, "ray_device_key", CpuPlatform.ray_device_key)
    ray_on_cpu.allow()
    with no_process_left():
        ray.init(
            num_cpus=2,
            num_gpus=2,
            include_dashboard=False,
            runtime_env={
                "worker_process_setup_hook": "tests.e2e.ray_on_cpu.allow",
                "env_vars": {"PYTHONPATH": str(ROOT)},
            },
        )
        yield
        ray.shutdown()


@pytest.mark.usefixtures("two_devices")
def test_two_ray_workers_say_what_one_rank_says_and_accept_as_much(
    tiny_target: Path, tiny_heads: Path, four_prompts: list[list[int]], alone: Decoded
) -> None:
    assert alone.counters.accepted > 0
    together = decode(
        tiny_target, tiny_heads, four_prompts, "dynamic", tensor_parallel_size=2, distributed_executor_backend="ray"
    )
    assert together == alone
