# SPDX-License-Identifier: Apache-2.0
"""A wrong input, and how the line that refuses it is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PLACE = "DIR"
"""What stands for the directory of the files, which differs from run to run."""


@dataclass(frozen=True)
class Case:
    """A wrong input.

    Attributes:
        given: the input, as the page shows it.
        names: what the line must hold; "`|`" in ``given`` and here is one of several values.
        refused: gives the input in an empty directory, and returns the line that refuses it.

    """

    given: str
    names: tuple[str, ...]
    refused: Callable[[Path], str]

    def line(self, directory: Path) -> str:
        """Return the refusal with ``PLACE`` for the directory; it must be one line of bounded length."""
        line = self.refused(directory)
        assert "\n" not in line, line
        assert len(line) < 1000, line
        return re.sub(rf"{re.escape(str(directory))}(?=/|\b)", PLACE, line)


@dataclass(frozen=True)
class Section:
    """Wrong inputs of one kind.

    Attributes:
        title: the heading.
        about: where the inputs are given.
        cases: in the page's order.

    """

    title: str
    about: str
    cases: tuple[Case, ...]


def value_error(call: Callable[[], object]) -> str:
    """Return the message with which a call refuses its input."""
    with pytest.raises((ValueError, OSError)) as refused:
        call()
    return str(refused.value)
