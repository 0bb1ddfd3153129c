# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of ``vllm-medusa train`` without and with what spares it repeated work.

    vllm-medusa fetch-demo --output build/smollm2
    python benchmarks/training_throughput.py --target build/smollm2 --data texts.jsonl --output build/throughput.json

Each row of the table is a run of a few steps in a process of its own, on the first records of the data, and the rows
take turns. A step counts from the end of the one before, so reading cached states counts and filling the cache does
not; that has a line of its own. ``--before`` names a checkout of another version, whose training without options is
one more row. Ratios are of processor time, which other users of a machine disturb less than time on the clock; with
one thread (``OMP_NUM_THREADS=1``) both are the same on an idle machine. For rows whose losses are the same mathematics
as the first row's, the table says how far they are off.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

CHILD = "--measure"


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        title: its name in the table.
        options: its settings.
        same_loss: whether its losses are the same mathematics as those of no options.
        checkout: where the code is; None for this one.

    """

    title: str
    options: dict[str, Any]
    same_loss: bool
    checkout: Path | None = None


@dataclass
class Figures:
    """What the runs of a way gave: each round's tokens per second, of the clock and of the processor, and losses."""

    tokens_per_second: list[float] = field(default_factory=list)
    tokens_per_cpu_second: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def ways(draft_vocab: int, cache: Path, before: Path | None) -> list[Way]:
    cached, kept = {"cache_hidden": True, "cache_directory": str(cache)}, {"draft_vocab": draft_vocab}
    some = f"{draft_vocab:,} tokens"
    return [
        *([Way("the version before", {}, True, before)] if before else []),
        Way("no option", {}, True),
        Way("hidden states kept", cached, True),
        Way(f"draft vocabulary of {some}", kept, False),
        Way(f"both, {some}", cached | kept, False),
        Way(f"both, {some}, loss KL", cached | kept | {"heads_loss": "kl"}, False),
    ]


def main(
    target: Annotated[str, typer.Option(help="The target.")] = "build/smollm2",
    data: Annotated[Path, typer.Option(help="A .jsonl file of records.")] = Path("build/train.jsonl"),
    records: Annotated[int, typer.Option(min=2, help="How many of its records are used.")] = 48,
    draft_vocab: Annotated[int, typer.Option(min=1, help="Tokens of the draft vocabulary.")] = 12288,
    shared_lm_head: Annotated[bool, typer.Option(help="Whether the heads share the target's LM head.")] = True,
    dtype: Annotated[str, typer.Option(help="The target's dtype.")] = "float32",
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    block_length: Annotated[int, typer.Option(help="Tokens per block.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Blocks per step.")] = 4,
    chunk_size: Annotated[int, typer.Option(help="As of vllm-medusa train.")] = 4096,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run; the first is not counted.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 2,
    before: Annotated[Path | None, typer.Option(help="A checkout of another version.")] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all numbers.")] = None,
) -> None:
    from vllm_medusa.demo.report import machine
    from vllm_medusa.versions import installed_versions

    with TemporaryDirectory() as directory:
        few = Path(directory) / "data.jsonl"
        with data.open() as lines:
            few.write_text("".join(islice(lines, records)))
        shape = {"block_length": block_length, "batch_size": batch_size, "chunk_size": chunk_size, "warmup_steps": 1}
        shared = {"target": target, "data": [str(few)], "shared_lm_head": shared_lm_head, "dtype": dtype}
        shared |= {"mixed_precision": mixed_precision, "steps": steps, "logging_steps": 1, "resume": "never", **shape}
        tried = ways(draft_vocab, Path(directory) / "cache", before)
        kl = tried[-1].options
        filled = measure(Way("filling", kl, False), shared, Path(directory))["filling"]
        found = {way.title: Figures() for way in tried}
        for _ in range(rounds):
            for way in tried:
                run = measure(way, shared, Path(directory))
                figures = found[way.title]
                tokens = batch_size * block_length
                figures.tokens_per_second.append(tokens / statistics.median(run["seconds"]))
                figures.tokens_per_cpu_second.append(tokens / statistics.median(run["cpu_seconds"]))
                figures.losses = run["losses"]
                speeds = figures.tokens_per_second[-1], figures.tokens_per_cpu_second[-1]
                print(f"{way.title}: {speeds[0]:.0f} tokens/s, {speeds[1]:.0f} by CPU", file=sys.stderr, flush=True)
    show(tried, found, filled)
    if output is not None:
        numbers = {name: vars(figures) for name, figures in found.items()}
        details = {"machine": machine(), "versions": installed_versions(), "command": sys.argv, "filling": filled}
        output.write_text(json.dumps(details | {"ways": numbers}, indent=2) + "\n")


def measure(way: Way, shared: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train in a process of its own; see ``train``."""
    settings = shared | way.options | {"output": str(directory / "run")}
    root = way.checkout or Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root.resolve())}
    command = [sys.executable, __file__, CHILD, json.dumps(settings)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train, and return seconds and losses of the steps, and tokens per CPU second at which the cache was filled."""
    from transformers import TrainerCallback
    from transformers.utils import logging

    from vllm_medusa.training import run
    from vllm_medusa.training.config import TrainConfig

    logging.disable_progress_bar()

    class Clock(TrainerCallback):
        ends: list[tuple[float, float]]
        losses: list[float]

        def __init__(self) -> None:
            self.ends, self.losses = [], []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []

    clock, filled = Clock(), []
    if "cache_hidden" in settings:
        cached_blocks = run.cached_blocks

        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            blocks = cached_blocks(*arguments)
            filled.append(sum(map(len, blocks)) * settings["block_length"] / (time.process_time() - start))
            return blocks

        run.cached_blocks = timed
    config = TrainConfig(**settings)
    config.output.joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
    run.run_training(config, [], show_progress=False, callbacks=[clock])
    steps = list(zip(clock.ends, clock.ends[1:], strict=False))
    seconds, cpu_seconds = ([end[of] - start[of] for start, end in steps] for of in (0, 1))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "losses": clock.losses,
        "filling": filled[0] if filled else None,
    }


def show(tried: list[Way], found: dict[str, Figures], filled: float) -> None:
    table = Table(title="vllm-medusa train")
    for column in ("", "tokens/s", "tokens/CPU s", "times the first", "losses off by"):
        table.add_column(column, justify="left" if not column else "right")
    first = found[tried[0].title]
    for way in tried:
        each = found[way.title]
        ratios = [a / b for a, b in zip(each.tokens_per_cpu_second, first.tokens_per_cpu_second, strict=True)]
        off = max(abs(a / b - 1) for a, b in zip(each.losses, first.losses, strict=True))
        speeds = [f"{statistics.median(values):.0f}" for values in (each.tokens_per_second, each.tokens_per_cpu_second)]
        table.add_row(way.title, *speeds, f"{statistics.median(ratios):.2f}", f"{off:.0e}" if way.same_loss else "")
    console = Console()
    console.print(table)
    console.print(f"Filling the cache, once, with the target's 64 most probable tokens: {filled:.0f} tokens/CPU s")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(train(json.loads(sys.argv[2]))))
    else:
        typer.run(main)
