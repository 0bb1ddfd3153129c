# SPDX-License-Identifier: Apache-2.0
"""What is reported: figures, each beside its floor and its goal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu_bench.roofline import Bound, Floor

UNITS = {"µs": 1e6, "ms": 1e3}
"""Units of time, and how many make a second."""


@dataclass(frozen=True)
class Goal:
    """What a figure should be.

    Attributes:
        most: the greatest figure that will do; None where its share of the floor counts.
        least_share: the least share of the floor's speed that will do; None where the figure counts.

    """

    most: float | None = None
    least_share: float | None = None

    def __str__(self) -> str:
        return f"at most {self.most:g}" if self.most is not None else f"at least {self.least_share:.0%}"

    def is_met(self, line: Line) -> bool:
        """Whether a line reaches it."""
        if self.most is not None:
            return line.value <= self.most
        assert self.least_share is not None
        assert line.share is not None
        return line.share >= self.least_share


@dataclass(frozen=True)
class Line:
    """A figure.

    Attributes:
        part: the part of the benchmark that it belongs to.
        what: what was measured.
        value: the figure.
        unit: its unit; empty for ratios and counts.
        floor: the least that it could be, in the same unit; None where bytes and operations do not bound it.
        bound: what the floor is made of; None for ratios.
        goal: what it should be; None where none is set.
        note: what else a reader should know.
        details: what else belongs to it, for the file.

    """

    part: str
    what: str
    value: float
    unit: str = ""
    floor: float | None = None
    bound: Bound | None = None
    goal: Goal | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def timed(cls, part: str, what: str, seconds: float, unit: str, floor: Floor, **others: Any) -> Line:
        """Make a line of a time and its floor."""
        scale = UNITS[unit]
        return cls(part, what, seconds * scale, unit, floor.seconds * scale, floor.bound, **others)

    @property
    def share(self) -> float | None:
        """The share of the floor's speed that was reached; a copy's rate is measured too, so it may exceed 1."""
        return self.floor / self.value if self.floor is not None and self.value > 0 else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        return None if self.goal is None else self.goal.is_met(self)

    def as_json(self) -> dict[str, Any]:
        """Return everything that is known of it."""
        return {
            "part": self.part,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "floor": self.floor,
            "bound": self.bound,
            "share_of_floor": self.share,
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
            "note": self.note,
            **self.details,
        }


def print_lines(lines: Iterable[Line], console: Console) -> None:
    """Print one table a part."""
    for part, group in groupby(lines, key=lambda line: line.part):
        table = Table(title=part)
        for column, justify in (("", "left"), *((name, "right") for name in ("measured", "floor", "share"))):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for column in ("bound by", "goal", "met", "note"):
            table.add_column(column)
        for line in group:
            table.add_row(
                line.what,
                _number(line.value, line.unit),
                "" if line.floor is None else _number(line.floor, line.unit),
                "" if line.share is None else f"{line.share:.0%}",
                line.bound or "",
                str(line.goal or ""),
                "" if line.met is None else ("yes" if line.met else "NO"),
                line.note,
            )
        console.print(table)


def _number(value: float, unit: str) -> str:
    """Write a number with three or four significant digits."""
    if value == int(value) and abs(value) < 1000:
        written = f"{value:.0f}"
    elif abs(value) < 1e-3:
        written = f"{value:.1e}"
    else:
        digits = next((digits for digits, bound in ((0, 1000), (1, 100), (2, 10)) if abs(value) >= bound), 3)
        written = f"{value:.{digits}f}"
    return f"{written} {unit}".rstrip()
