# SPDX-License-Identifier: Apache-2.0
"""The choice, at an engine's start, of the way to attend for trees."""

from __future__ import annotations

import os
from functools import cache

from vllm_medusa.attention.cpu.build import BuildError, load_library
from vllm_medusa.attention.cpu.fused import FusedTrees
from vllm_medusa.attention.cpu.padded import PaddedTrees
from vllm_medusa.attention.cpu.tree_pass import TreePass
from vllm_medusa.compat.log import logger

VARIABLE = "MEDUSA_CPU_ATTENTION"
"""The environment variable that names the way: ``CHOICES``, ``auto`` by default."""

CHOICES = ("auto", "fused", "torch")
"""The fused op where it can be built; the fused op or no start; torch calls."""


def selected_pass() -> type[TreePass]:
    """Return the way to attend for trees, and say which in the log, once.

    Raises:
        ValueError: ``MEDUSA_CPU_ATTENTION`` has another value, or asks for the fused op, which cannot be built.

    """
    choice = os.environ.get(VARIABLE, CHOICES[0])
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}; it must be one of {', '.join(CHOICES)}")
    return _selected(choice)


@cache
def _selected(choice: str) -> type[TreePass]:
    if choice == "torch":
        logger.info("Medusa: draft trees attend by torch calls, as %s asks", VARIABLE)
        return PaddedTrees
    try:
        seconds = load_library()
    except BuildError as error:
        if choice == "fused":
            raise ValueError(
                f"{VARIABLE} is 'fused', but the fused op cannot be built: {error}; install a C++ compiler and ninja, "
                "or give 'auto'"
            ) from error
        logger.warning(
            "Medusa: draft trees attend by torch calls, for the faster fused op cannot be built: %s; install a C++ "
            "compiler and ninja, or set %s=torch",
            error,
            VARIABLE,
        )
        return PaddedTrees
    logger.info(
        "Medusa: draft trees attend by the fused op, %s", f"built in {seconds:.0f} s" if seconds else "built before"
    )
    return FusedTrees
