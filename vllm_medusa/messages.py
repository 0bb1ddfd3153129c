# SPDX-License-Identifier: Apache-2.0
"""Parts of error messages, each of one line and of bounded length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def one_line(error: BaseException) -> str:
    """Return an error's message in one line; its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened_message(error: BaseException, most: int = 200) -> str:
    """Return an error's message in one line, cut to ``most`` characters."""
    text = one_line(error)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shortened(value: Any, most: int = 60) -> str:
    """Return a value's ``repr``, cut to ``most`` characters."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
