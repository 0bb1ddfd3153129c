"""What all tests share: the engine's environment and the tiny models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.under_test import UNDER_TEST

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
UNDER_TEST.install()


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
def held_out_prompts() -> list[list[int]]:
    """At least 256 prompts of 16 to 96 token ids from text that the tiny models were not trained on."""
    from tests import models

    return models.held_out_prompts()
