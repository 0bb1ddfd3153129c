# SPDX-License-Identifier: Apache-2.0
"""What a tensor-parallel engine says, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from vllm import SamplingParams

from tests.integration.engines import SpecCounters, Tree, engine, generate, greedy, spec_counters, texts

SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=77, max_tokens=24, ignore_eos=True, detokenize=False)


@dataclass(frozen=True)
class Decoded:
    greedy: list[list[int]]
    seeded: list[list[int]]
    counters: SpecCounters


def decode(target: Path, heads: Path, prompts: list[list[int]], tree: Tree, **options: Any) -> Decoded:
    """Decode with a branching tree, greedily and with a seed."""
    with engine(target, heads=heads, tree=tree, max_num_seqs=4, max_model_len=128, **options) as llm:
        return Decoded(
            greedy=texts(generate(llm, prompts, greedy(24))),
            seeded=texts(generate(llm, prompts, SEEDED)),
            counters=spec_counters(llm),
        )


@contextmanager
def no_process_left() -> Iterator[None]:
    """Assert that every process that was started in this context has ended, but Python's own resource tracker."""
    before = set(psutil.Process().children(recursive=True))
    yield
    started = [process for process in psutil.Process().children(recursive=True) if process not in before]
    started = [process for process in started if not is_resource_tracker(process)]
    _, left = psutil.wait_procs(started, timeout=60)
    assert left == [], f"{left} are still there"


def is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # It has just ended.
        return False
