from __future__ import annotations

from importlib.metadata import version

import vllm_medusa


def test_the_version_is_that_of_the_distribution() -> None:
    assert vllm_medusa.__version__ == version("vllm-medusa")
