# SPDX-License-Identifier: Apache-2.0
"""What contenders did under each load: as a table, a plot and a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_medusa.demo.contenders import PLAIN
from vllm_medusa.demo.report import machine
from vllm_medusa.files import replaced_file, write_json
from vllm_medusa.versions import installed_versions


@dataclass(frozen=True)
class Result:
    """A contender under a load.

    Attributes:
        tokens_per_second: of all requests together.
        speedup: against plain decoding; None without it.
        time_per_token_p50: milliseconds, over requests.
        time_per_token_p95: the same.
        rows_per_step: the target's rows.

    """

    tokens_per_second: float
    speedup: float | None
    time_per_token_p50: float
    time_per_token_p95: float
    rows_per_step: float


Results = Mapping[int, Mapping[str, Result]]
"""By number of requests, then by contender."""


def report(results: Results, title: str, directory: Path, about: Mapping[str, Any]) -> None:
    """Print a table, and write ``load.json`` and ``load.png``."""
    print_table(results, title)
    speed = {str(most): {name: each.tokens_per_second for name, each in own.items()} for most, own in results.items()}
    details = {str(most): {name: asdict(each) for name, each in own.items()} for most, own in results.items()}
    run = {"machine": machine(), "versions": installed_versions(), "command": " ".join(sys.argv), **about}
    write_json(directory / "load.json", {"concurrency": speed, "details": details, **run})
    plot(results, directory / "load.png")


def print_table(results: Results, title: str) -> None:
    """Print a line for each load and contender."""
    table = Table(title=title)
    for column in ("requests", "contender", "tokens/s", "/plain", "ms/token p50", "p95", "rows/step"):
        table.add_column(column, justify="right")
    for most, own in results.items():
        for name, each in own.items():
            table.add_row(
                str(most),
                name,
                f"{each.tokens_per_second:.1f}",
                "" if each.speedup is None else f"{each.speedup:.2f}",
                f"{each.time_per_token_p50:.1f}",
                f"{each.time_per_token_p95:.1f}",
                f"{each.rows_per_step:.1f}",
            )
    Console().print(table)


def plot(results: Results, path: Path) -> None:
    """Draw tokens per second over the number of requests, as a multiple of plain decoding's where that took part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    loads = list(results)
    for name in results[loads[0]]:
        each = [results[most][name] for most in loads]
        axes.plot(loads, [one.speedup or one.tokens_per_second for one in each], "o-", label=name)
    has_plain = PLAIN in results[loads[0]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(most) for most in loads])
    axes.set_xlabel("requests at once")
    axes.set_ylabel("tokens per second" + (", plain decoding = 1" if has_plain else ""))
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_file(path, "wb") as stream:
        figure.savefig(stream, dpi=150, format="png")
