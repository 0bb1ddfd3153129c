# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the engine's environment and the tiny models."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.under_test import UNDER_TEST

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM's 5 s guard a server against users, and fail a test on a busy machine.
os.environ.setdefault("VLLM_REGEX_COMPILATION_TIMEOUT_S", "60")
UNDER_TEST.install()


ONE_BY_ONE = ("tests/integration/test_v2.py::", "tests/unit/test_triton_kernels.py::")
"""Files of few long tests, each a process of its own, that share nothing; the first begins with its longest."""

TOGETHER = (
    # Each test runs two ranks, for which two cores are just enough.
    ("tests/e2e/test_ray.py::", "tests/e2e/test_tensor_parallel.py::"),
    # They share a server.
    ("tests/e2e/test_distill_server.py::", "tests/e2e/test_serve.py::"),
    # They fork from one process that has imported what takes long.
    (
        "tests/e2e/test_distill_resume.py::",
        "tests/e2e/test_train_distributed.py::",
        "tests/e2e/test_train_resume.py::",
    ),
    # They compare with the same texts.
    (
        "tests/integration/test_budget.py::",
        "tests/integration/test_dynamic_trees.py::",
        "tests/integration/test_sequential_heads.py::",
    ),
)
"""Files that one worker runs, one after the other."""


# Importing vLLM makes a million objects and hardly any garbage to look for among them.
gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage again from here on, but not among what has been imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let Python take down all that was imported as it ends."""
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let pytest-xdist's workers start with what takes longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(ONE_BY_ONE))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests, which share its engines, on one worker, but for those that share nothing."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(ONE_BY_ONE):
                return nodeid
            group = next((files for files in TOGETHER if nodeid.startswith(files)), None)
            return group[0] if group else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def tiny_target() -> Path:
    """The directory of a small trained Llama (2 layers, 128 wide, 1024 tokens, fp32) and its tokenizer."""
    from tests import models

    return models.tiny_target()


@pytest.fixture(scope="session")
def tiny_heads() -> Path:
    """The directory of the tiny target's four trained heads."""
    from tests import models

    return models.tiny_heads()


@pytest.fixture(scope="session")
def tiny_sequential_heads() -> Path:
    """The directory of four trained heads for the tiny target that read the path to a node."""
    from tests import models

    return models.tiny_sequential_heads()


@pytest.fixture(scope="session")
def with_lookup(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Copies heads, with weights of what followed a path before in their ``config.json``."""
    weights = [[0.1, 0.4, 0.5, 0.6, 0.9]] * 4

    def copied(heads: Path) -> Path:
        copy = shutil.copytree(heads, tmp_path_factory.mktemp("with_lookup") / "heads")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"medusa_lookup_weights": weights}))
        return copy

    return copied


@pytest.fixture(scope="session")
def tiny_sequential_heads_with_lookup(tiny_sequential_heads: Path, with_lookup: Callable[[Path], Path]) -> Path:
    """The directory of the sequential heads, which also draft what followed a path before."""
    return with_lookup(tiny_sequential_heads)


@pytest.fixture(scope="session")
def held_out_prompts() -> list[list[int]]:
    """At least 256 prompts of 16 to 96 token ids from text that the tiny models were not trained on."""
    from tests import models

    return models.held_out_prompts()
