# SPDX-License-Identifier: Apache-2.0
"""What was measured so far, in a file from the first figure on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from gpu_bench.lines import Line, print_lines
from gpu_bench.roofline import Rates
from vllm_medusa.files import write_json


@dataclass
class Report:
    """Figures.

    Attributes:
        output: the file for them; None writes none.
        head: what was measured, where, and with which command.
        lines: the figures.
        failures: what could not be measured, and why.
        begun: when, by ``time.monotonic``.

    """

    output: Path | None
    head: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def add(self, lines: Iterable[Line]) -> None:
        """Take in lines as they come."""
        for line in lines:
            self.lines.append(line)
            self.write()
            print(f"{line.part}: {line.what}: {line.value:.4g} {line.unit}".rstrip(), file=sys.stderr)

    def fail(self, what: str, error: Exception) -> None:
        """Take in that something could not be measured."""
        self.failures[what] = str(error)
        self.write()

    def write(self) -> None:
        """Write the file."""
        if self.output is not None:
            lines = [line.as_json() for line in self.lines]
            seconds = round(time.monotonic() - self.begun)
            write_json(self.output, self.head | {"seconds": seconds, "lines": lines, "failures": self.failures})

    def show(self, console: Console) -> None:
        """Print tables, which goals are met, and what is missing."""
        parts = [*dict.fromkeys(line.part for line in self.lines)]
        print_lines(sorted(self.lines, key=lambda line: parts.index(line.part)), console)
        judged = [line for line in self.lines if line.goal is not None]
        console.print(f"{sum(bool(line.met) for line in judged)} of {len(judged)} goals are met.")
        for what, why in self.failures.items():
            console.print(f"not measured: {what}: {why}", markup=False)


def print_rates(rates: Rates, console: Console) -> None:
    """Print what floors are made of."""
    console.print(f"A copy reads and writes {rates.copied_bytes / 1e12:.3g} TB/s.")
    for dtype, operations in rates.operations.items():
        console.print(f"Products of {dtype} reach {operations / 1e12:.3g} TFLOP/s.")
