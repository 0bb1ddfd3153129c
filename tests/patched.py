# SPDX-License-Identifier: Apache-2.0
"""What stands at this moment in the places of vLLM that the plugin patches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_medusa.compat.symbols import PATCHED


def standing(*lifetimes: str) -> dict[str, Any]:
    """Return the value of each patched place, a copy where it is a registry; all places unless lifetimes are given."""
    return {where: _value(where) for where, lifetime in PATCHED.items() if not lifetimes or lifetime in lifetimes}


def changes(before: dict[str, Any]) -> list[str]:
    """Return the places that differ from what ``standing`` gave before."""
    return [where for where, value in before.items() if _value(where) != value]


def _value(where: str) -> Any:
    module, _, path = where.partition(":")
    value: Any = import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value.copy() if isinstance(value, dict | set) else value
