# SPDX-License-Identifier: Apache-2.0
"""Show the demo's results as a JSON file, a table, and a plot."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_medusa.demo.contenders import TITLES
from vllm_medusa.demo.engine import Decoded, acceptance_length
from vllm_medusa.demo.race import Run
from vllm_medusa.files import replaced_file, write_json
from vllm_medusa.versions import installed_versions

COLOURS = ["#9aa5b1", "#6c8ebf", "#2a9d8f", "#e9a23b"]

Figures = dict[str, Any]


def summarise(runs: Mapping[str, Run]) -> dict[str, Figures]:
    """Compute each contender's figures over all questions that it has answered (see ``summarise_by_kind``)."""
    return {name: figures_of(run, next(iter(runs.values())), run.answers) for name, run in runs.items()}


def summarise_by_kind(runs: Mapping[str, Run], kinds: Sequence[str]) -> dict[str, dict[str, Figures]]:
    """Compute each contender's figures over the questions of each kind.

    Args:
        runs: the contenders' runs; the first is the baseline.
        kinds: each question's kind.

    Returns:
        By kind and contender: ``tokens_per_second``, ``milliseconds_per_step`` and ``speedup`` (against the baseline
        on the same question) are medians over questions; ``tokens_per_step`` and ``drafted_tokens`` (per step) are
        over all steps; ``identical_texts`` are those of ``texts`` that are the baseline's, in fp32.

    """
    baseline = next(iter(runs.values()))
    return {
        kind: {
            name: figures_of(run, baseline, [number for number in run.answers if kinds[number] == kind])
            for name, run in runs.items()
        }
        for kind in dict.fromkeys(kinds)
    }


def figures_of(run: Run, baseline: Run, numbers: Iterable[int]) -> Figures:
    """Compute a contender's figures over some questions; raises ``ValueError`` if none of them takes a step."""
    asked = list(numbers)
    # An answer of one token is the prompt's own step: there is nothing to time.
    timed = [number for number in asked if len(run.answers[number].texts[0]) > 1]
    if not timed:
        raise ValueError("no answer has more than one token; give other questions, or more --tokens")
    answers = [run.answers[number] for number in timed]
    steps = sum(answer.steps for answer in answers)
    speeds = [_tokens_per_second(answer) for answer in answers]
    plain = [_tokens_per_second(baseline.answers[number]) for number in timed]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_step": acceptance_length(steps, sum(answer.accepted for answer in answers)),
        "speedup": statistics.median(own / other for own, other in zip(speeds, plain, strict=True)),
        "milliseconds_per_step": statistics.median(map(_milliseconds_per_step, answers)),
        "drafted_tokens": sum(answer.drafted for answer in answers) / steps,
        "identical_texts": sum(run.exact[number] == baseline.exact[number] for number in asked),
        "texts": len(asked),
    }


def write_results(path: Path, details: Mapping[str, Any]) -> None:
    write_json(path, {"machine": machine(), "versions": installed_versions(), **details})


def print_table(summary: Mapping[str, Figures], by_kind: Mapping[str, Mapping[str, Figures]], console: Console) -> None:
    """Print tokens per step and speedup by kind, then each contender's speed and how many texts are the same."""
    table = Table(title="Tokens per step, and speed against plain vLLM; one request at a time, greedy")
    table.add_column("")
    for name in summary:
        table.add_column(TITLES[name], justify="right")
    for kind, figures in by_kind.items():
        table.add_row(kind, *map(_cell, figures.values()))
    table.add_section()
    table.add_row("all", *map(_cell, summary.values()), style="bold")
    table.add_row("tokens/s", *(f"{each['tokens_per_second']:.1f}" for each in summary.values()))
    table.add_row("drafted per step", *(f"{each['drafted_tokens']:.1f}" for each in summary.values()))
    table.add_row("same text, fp32", *(f"{each['identical_texts']} of {each['texts']}" for each in summary.values()))
    console.print(table)


def draw(
    path: Path, summary: Mapping[str, Figures], by_kind: Mapping[str, Mapping[str, Figures]], caption: str
) -> None:
    """Draw each contender's tokens per second, and its tokens per step by kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, steps = figure.subplots(1, 2, width_ratios=(2, 3))
    titles = [TITLES[name] for name in summary]
    bars = speed.barh(titles, [each["tokens_per_second"] for each in summary.values()], color=COLOURS)
    speed.bar_label(
        bars, [f"{each['tokens_per_second']:.1f} ({each['speedup']:.2f}x)" for each in summary.values()], padding=3
    )
    speed.invert_yaxis()
    speed.margins(x=0.3)
    speed.set_xlabel("tokens per second (speed against plain vLLM)")

    groups = {**by_kind, "all": summary}
    width = 0.8 / len(summary)
    for index, name in enumerate(summary):
        places = [group + (index - (len(summary) - 1) / 2) * width for group in range(len(groups))]
        values = [figures[name]["tokens_per_step"] for figures in groups.values()]
        bars = steps.bar(places, values, width, color=COLOURS[index], label=TITLES[name])
        steps.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    steps.set_xticks(range(len(groups)), groups, fontsize=8)
    steps.set_ylabel("tokens per step")
    steps.margins(y=0.25)
    steps.legend(ncols=len(summary), fontsize=7, loc="upper center", frameon=False)
    for axis in (speed, steps):
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=8)
    with replaced_file(path, "wb") as stream:
        figure.savefig(stream, dpi=150, format="png")


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpu": None}


def _cell(figures: Figures) -> str:
    return f"{figures['tokens_per_step']:.2f}, {figures['speedup']:.2f}x"


def _tokens_per_second(answer: Decoded) -> float:
    """Do not count the first token: it comes from the prompt's step, and time starts after it."""
    return (len(answer.texts[0]) - 1) / answer.seconds


def _milliseconds_per_step(answer: Decoded) -> float:
    return answer.seconds / answer.steps * 1e3
