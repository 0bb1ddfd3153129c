# SPDX-License-Identifier: Apache-2.0
"""Show the demo's results as a JSON file, a table, and a plot."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_medusa.demo.contenders import NATIVE_CHAIN, PLAIN, TREE, TREE_WIDE, Run
from vllm_medusa.demo.engine import Decoded
from vllm_medusa.files import replaced_file, write_json
from vllm_medusa.versions import installed_versions

TITLES = {
    PLAIN: "plain vLLM",
    NATIVE_CHAIN: "vLLM's chain",
    TREE: "our tree",
    TREE_WIDE: "our wide tree",
}
COLOURS = ["#9aa5b1", "#6c8ebf", "#2a9d8f", "#21867a"]


def summarise(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Compute each contender's metrics; the first contender is the baseline.

    ``tokens_per_second``, ``milliseconds_per_step`` and ``speedup`` (against the baseline in the same round) are
    medians over the timed rounds. ``tokens_per_step``, ``drafted_tokens`` (per step) and ``identical_texts`` (of
    ``texts``, against the baseline) are the exact run's. ``identical_share_timed`` is that of the timed rounds.
    """
    baseline = next(iter(runs.values()))
    speeds = {name: [_tokens_per_second(decoded) for decoded in run.rounds] for name, run in runs.items()}
    summary = {}
    for name, run in runs.items():
        ratios = [own / plain for own, plain in zip(speeds[name], next(iter(speeds.values())), strict=True)]
        summary[name] = {
            "drafted_tokens": run.exact.drafted / run.exact.drafts if run.exact.drafts else 0.0,
            "tokens_per_second": statistics.median(speeds[name]),
            "tokens_per_second_by_round": speeds[name],
            "speedup": statistics.median(ratios),
            "milliseconds_per_step": statistics.median(map(_milliseconds_per_step, run.rounds)),
            "tokens_per_step": _tokens_per_step(run),
            "identical_texts": sum(map(list.__eq__, run.exact.texts, baseline.exact.texts)),
            "texts": len(run.exact.texts),
            "identical_share_timed": statistics.mean(
                own.texts == plain.texts for own, plain in zip(run.rounds, baseline.rounds, strict=True)
            ),
        }
    return summary


def write_results(path: Path, summary: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    write_json(path, {"machine": machine(), "versions": installed_versions(), **details, "runs": summary})


def print_table(summary: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    table = Table(title="One request at a time, greedy")
    table.add_column("")
    for column in ("drafted", "tokens/step", "tokens/s", "speedup", "same text, fp32"):
        table.add_column(column, justify="right")
    for name, run in summary.items():
        table.add_row(
            TITLES[name],
            f"{run['drafted_tokens']:.1f}",
            f"{run['tokens_per_step']:.2f}",
            f"{run['tokens_per_second']:.1f}",
            f"{run['speedup']:.2f}x",
            f"{run['identical_texts']} of {run['texts']}",
        )
    console.print(table)
    shares = ", ".join(f"{TITLES[name]} {run['identical_share_timed']:.0%}" for name, run in summary.items())
    console.print(f"Texts of the timed runs that are plain vLLM's: {shares}.")


def draw(path: Path, summary: Mapping[str, Mapping[str, Any]], caption: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    titles = [TITLES[name] for name in summary]
    for axis, key, label in zip(
        axes, ("tokens_per_second", "tokens_per_step"), ("tokens per second", "tokens per step"), strict=True
    ):
        bars = axis.barh(titles, [run[key] for run in summary.values()], color=COLOURS)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.margins(x=0.15)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel(caption, fontsize=8)
    with replaced_file(path, "wb") as stream:
        figure.savefig(stream, dpi=150, format="png")
    pyplot.close(figure)


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpu": None}


def _tokens_per_second(decoded: Decoded) -> float:
    """Count no text's first token: it comes from the prompt's step, and time starts after it."""
    return sum(len(text) - 1 for text in decoded.texts) / decoded.seconds


def _tokens_per_step(run: Run) -> float:
    return 1 + run.exact.accepted / run.exact.drafts if run.exact.drafts else 1.0


def _milliseconds_per_step(decoded: Decoded) -> float:
    steps = decoded.drafts or sum(len(text) - 1 for text in decoded.texts)
    return decoded.seconds / steps * 1e3
