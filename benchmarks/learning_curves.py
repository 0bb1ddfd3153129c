# SPDX-License-Identifier: Apache-2.0
"""How heads learn: accuracy and tokens per step against tokens of text and passes, and what each setting changes.

    python benchmarks/learning_curves.py --target TARGET --data DATA --held-out FILE --output a.json --plot a.png

Plain and sequential heads are trained on an eighth of the text, a quarter, a half, all of it, and more passes; then one
setting at a time is changed, with as many tokens each. The learning rate of every run falls to 0, so that each point is
of heads that could be served. Judged where steps begin on held-out text, as ``vllm-medusa eval`` does: tokens per step
are what the best trees expect there. Finished runs are not repeated. docs/training.md has what it printed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_medusa.data.packing import Sample
from vllm_medusa.data.record_files import BadLines
from vllm_medusa.demo.report import machine
from vllm_medusa.evaluation.calibration import Calibration
from vllm_medusa.evaluation.measure import evaluate_heads, load_heads
from vllm_medusa.evaluation.reading import Remembered
from vllm_medusa.evaluation.text import Sources, held_out_samples
from vllm_medusa.files import read_json, write_json
from vllm_medusa.progress import track
from vllm_medusa.versions import installed_versions

BLOCK_LENGTH = 512
NODES = (4, 8, 16, 32)
PASSES = (0.125, 0.25, 0.5, 1.0, 2.0)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "block_length": BLOCK_LENGTH,
    "batch_size": 1,
    "learning_rate": 2e-3,
    "shared_lm_head": True,
    "draft_vocab": 2048,
    "heads_loss": "kl",
    "cache_hidden": True,
    "save_steps": 100_000,
}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "sequential": {"path_rank": 256}}
CHANGES: dict[str, dict[str, Any]] = {
    "hard labels": {"heads_loss": "cross_entropy"},
    "two layers": {"num_layers": 2},
    "4 blocks a step": {"batch_size": 4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "labels on all tokens": {"labels": "all"},
    "Muon": {"optimizer": "muon"},
    "Muon, labels on all tokens": {"optimizer": "muon", "labels": "all"},
    "rank 128": {"path_rank": 128},
    "rank 512": {"path_rank": 512},
    "6,144 tokens": {"draft_vocab": 6144},
    "whole vocabulary": {"draft_vocab": None},
}


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        kind: of heads.
        change: what differs from ``SETTINGS``; empty: nothing.
        passes: over the text.
        settings: those that differ.

    """

    kind: str
    change: str
    passes: float
    settings: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.passes:g} {self.change}".strip().replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Point:
    """What a run's heads do on held-out text.

    Attributes:
        kind: of heads.
        change: what differs from ``SETTINGS``.
        passes: over the text.
        tokens: that were trained on, repeated ones counted again.
        top1: ``[heads]``: accuracies.
        chain: expected tokens per step of the chain.
        trees: those of the best tree of each number of nodes.

    """

    kind: str
    change: str
    passes: float
    tokens: int
    top1: list[float]
    chain: float
    trees: dict[int, float]


def runs(passes: Sequence[float], changed_passes: float) -> list[Run]:
    """Return the curves' runs, and those with one setting changed."""
    curves = [Run(kind, "", each, settings) for each in passes for kind, settings in KINDS.items()]
    changed = [
        Run(kind, change, changed_passes, settings | changes)
        for change, changes in CHANGES.items()
        for kind, settings in KINDS.items()
        if "path_rank" in settings or "path_rank" not in changes
    ]
    return curves + changed


def main(
    target: Annotated[Path, typer.Option(help="The target's directory.")],
    data: Annotated[list[Path], typer.Option(help="Text that the target wrote, as distill writes it.")],
    held_out: Annotated[Path, typer.Option(help="A file of further such text.")],
    directory: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("build/learning_curves"),
    passes: Annotated[
        list[float] | None, typer.Option(help=f"Passes over the text; below 1 a share of it. Default: {PASSES}.")
    ] = None,
    changed_passes: Annotated[float, typer.Option(help="Passes of the runs with one setting changed.")] = 0.5,
    only: Annotated[list[str] | None, typer.Option(help="Changes to run. Default: all.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a held-out text.")] = 512,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for the curves.")] = None,
) -> None:
    unknown = set(only or ()) - set(CHANGES)
    if unknown:
        raise typer.BadParameter(f"--only: {sorted(unknown)[0]!r} must be one of {', '.join(CHANGES)}")
    wanted = [
        run for run in runs(passes or PASSES, changed_passes) if not run.change or run.change in (only or CHANGES)
    ]
    for run in wanted:
        train(run, target, data, held_out, directory)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    text = Sources((), (held_out,), style=None, bad_lines=BadLines.REFUSE, new_tokens=0, max_length=max_length)
    samples = held_out_samples(model, AutoTokenizer.from_pretrained(target), text, batch_size=1)
    states_of = Remembered(model)
    points = [judge(run, target, model, samples, directory, states_of) for run in track(wanted, "Heads")]
    show(points)
    if output is not None:
        details = {"machine": machine(), "versions": installed_versions(), "command": sys.argv, "settings": SETTINGS}
        write_json(output, details | {"points": [asdict(point) for point in points]})
    if plot is not None:
        draw(plot, [point for point in points if not point.change])


def train(run: Run, target: Path, data: Sequence[Path], held_out: Path, directory: Path) -> None:
    """Train a run's heads unless they are there; all runs share the target's hidden states."""
    if (directory / run.name / "results.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    own = {"target": str(target), "data": list(map(str, data)), "held_out": [str(held_out)], "epochs": run.passes}
    places = {"output": str(directory / run.name), "cache_directory": str(directory / "hidden")}
    settings = SETTINGS | run.settings | own | places
    file = directory / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    print("+ vllm-medusa train --config", file, flush=True)
    subprocess.run([sys.executable, "-m", "vllm_medusa.cli", "train", "--config", str(file)], check=True)


def judge(
    run: Run, target: Path, model: PreTrainedModel, samples: Sequence[Sample], directory: Path, states_of: Remembered
) -> Point:
    trained = directory / run.name
    heads = load_heads(trained / "heads", target, model)
    evaluation = evaluate_heads(model, heads, samples, show_progress=False, states_of=states_of, lookup=False)
    best = Calibration.of(evaluation.accuracies, evaluation.paths, evaluation.temperatures, None, max(NODES))
    steps = read_json(trained / "results.json")["steps"]
    batch_size = (SETTINGS | run.settings)["batch_size"]
    return Point(
        kind=run.kind,
        change=run.change,
        passes=run.passes,
        tokens=steps * batch_size * BLOCK_LENGTH,
        top1=[ranks[0] for ranks in evaluation.accuracies],
        chain=best.expected_length_of_chain,
        trees={nodes: best.expected_lengths[nodes - 1] for nodes in NODES},
    )


def show(points: Sequence[Point]) -> None:
    """Print a table of the curves and one of the changes, each change beside the run that it changes."""
    changed = {point.passes for point in points if point.change}
    tables = {
        "Tokens of text and passes": [point for point in points if not point.change],
        "One setting changed": [point for point in points if point.passes in changed],
    }
    for title, rows in tables.items():
        table = Table(title=title)
        for column in ("heads", "changed", "passes", "tokens", "top-1 by head", "chain", *map(str, NODES)):
            table.add_column(column)
        for point in sorted(rows, key=lambda each: (each.kind, each.passes)):
            top1 = " ".join(f"{value:.3f}" for value in point.top1)
            lengths = (f"{value:.3f}" for value in (point.chain, *point.trees.values()))
            table.add_row(point.kind, point.change, f"{point.passes:g}", f"{point.tokens:,}", top1, *lengths)
        Console(width=140).print(table)


def draw(path: Path, points: Sequence[Point]) -> None:
    """Plot accuracy by head, and tokens per step, against the tokens trained on."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for kind, color in zip(KINDS, ("#9aa5b1", "#2a6f97"), strict=True):
        own = sorted((point for point in points if point.kind == kind), key=lambda point: point.tokens)
        tokens = [point.tokens for point in own]
        for head, style in zip(range(len(own[0].top1)), ("-", "--", "-.", ":"), strict=False):
            values = [point.top1[head] for point in own]
            left.plot(tokens, values, style, color=color, marker="o", markersize=3, label=f"{kind}, head {head + 1}")
        right.plot(tokens, [point.chain for point in own], "--", color=color, marker="o", label=f"{kind}, chain")
        largest = [point.trees[NODES[-1]] for point in own]
        right.plot(tokens, largest, "-", color=color, marker="o", label=f"{kind}, tree of {NODES[-1]} nodes")
    left.set(ylabel="top-1 accuracy, held out", ylim=(0, None))
    right.set(ylabel="expected tokens per step", ylim=(1, None))
    whole = [point.tokens for point in points if point.passes == 1]
    for axis in (left, right):
        axis.set(xlabel="tokens trained on", xscale="log")
        if whole:
            axis.axvline(whole[0], color="#d5d9de", linewidth=1, zorder=0)
            axis.annotate("one pass", (whole[0], axis.get_ylim()[1]), va="top", fontsize=8, color="#6b7580")
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
