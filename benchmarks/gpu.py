# SPDX-License-Identifier: Apache-2.0
"""What trees cost on a GPU, every figure beside the least that the device could do.

The device's rates are measured first: what a large copy moves, what large products compute. A figure's floor is the
time that its bytes and operations take at these rates (``gpu_bench/roofline.py``), and the goals follow from floors.

    python benchmarks/gpu.py --output build/gpu.json

Weights, keys, values and prompts are made up: time does not depend on them, but acceptance does. So the race says what
a step costs, and from how many tokens per step on a tree is faster than plain decoding. With ``--target``, ``--heads``
and ``--text`` it decodes real text. ``--tiny`` runs everything at toy size on a CPU, in Triton's interpreter, to see it
run.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gpu_bench import attention, kernels, settings
from gpu_bench.lineup import Part, Setting
from gpu_bench.race import race_lines
from gpu_bench.report import Report, print_rates
from gpu_bench.roofline import Rates
from gpu_bench.settings import DIRECTORY, Settings
from gpu_bench.worker import Worker, started
from vllm_medusa.demo.process import share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.versions import installed_versions

PARTS = (kernels.PART, attention.PART, *map(str, Part))
ALL_PARTS = (*PARTS, attention.TILINGS)
FILE_WIDTH = 150
"""Columns of what is not printed on a terminal."""

MEANINGLESS = "Toy sizes, interpreted on a CPU: times mean nothing, and no goal of speed is judged."


def main(
    only: Annotated[
        str, typer.Option(help=f"Parts of {', '.join(ALL_PARTS)}; tilings are measured only when named.")
    ] = ",".join(PARTS),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which engines take turns.")] = 3,
    minutes: Annotated[float, typer.Option(help="No engine starts and no round begins after these.")] = 7.0,
    target: Annotated[Path | None, typer.Option(help="A Llama's directory, with its tokenizer, for the race.")] = None,
    heads: Annotated[Path | None, typer.Option(help="The directory of its heads.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text of which its prompts are cut.")] = None,
    tiny: Annotated[bool, typer.Option(help="Toy sizes on a CPU.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all figures.")] = None,
) -> None:
    """Measure, print, and say which goals are met."""
    deadline, console = time.monotonic() + 60 * minutes, Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    parts = frozenset(part.strip() for part in only.split(","))
    if unknown := parts - {*ALL_PARTS}:
        raise typer.BadParameter(f"--only: {', '.join(unknown)} is none of {', '.join(ALL_PARTS)}")
    if len({target is None, heads is None, text is None}) > 1:
        raise typer.BadParameter("--target, --heads and --text go together; give all three or none")
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is here; give --tiny to run at toy size on a CPU")
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # Read where Triton is imported.
        console.print(MEANINGLESS)
    share_environment()
    sizes = settings.tiny(rounds) if tiny else settings.full(rounds)
    racing = frozenset(part for part in Part if part in parts)
    if target is not None and heads is not None and text is not None:
        lineup = settings.given(sizes, target, heads, text, racing)
    else:
        lineup = settings.made_up(sizes, racing)
    head = {"machine": machine(), "versions": installed_versions(), "command": " ".join(["python", *sys.argv])}
    report = Report(output, head | {"tiny": tiny})
    if measured := measure_device(sizes, kernels.PART in parts, report, console):
        rates, free_bytes = measured
        if parts & {attention.PART, attention.TILINGS}:
            measure_attention(sizes, parts, rates, report)
        if racing:
            setting = Setting(sizes.race, lineup, sizes.options, rates, free_bytes, not tiny, deadline)
            report.add(race_lines(setting, report.fail))
    report.show(console)
    raise typer.Exit(1 if report.failures else 0)


def measure_device(sizes: Settings, with_kernels: bool, report: Report, console: Console) -> tuple[Rates, int] | None:
    """Measure what needs no engine; return the device's rates and its free memory in bytes, None if that failed."""
    with started([Worker("device", kernels.Device, sizes.kernels)], report.fail) as workers:
        for device in workers:
            try:
                report.head["machine"]["gpu"] = device.call("name")
                rates: Rates = device.call("rates")
                report.head["rates"] = asdict(rates)
                print_rates(rates, console)
                free_bytes: int = device.call("free_bytes")
                if with_kernels:
                    report.add(device.call("lines", rates))
            except RuntimeError as error:
                report.fail(device.name, error)
                return None
            return rates, free_bytes
    return None


def measure_attention(sizes: Settings, parts: frozenset[str], rates: Rates, report: Report) -> None:
    """Measure attention layers, one after the other, of engines that start side by side."""
    layers = [
        Worker(
            f"attention, {shape.name}",
            attention.Layer,
            *(shape, sizes.attention, sizes.options, DIRECTORY / f"attention-{index}"),
            VLLM_PLUGINS="medusa",
        )
        for index, shape in enumerate(sizes.layers)
    ]
    with started(layers, report.fail) as workers:
        for worker in workers:
            try:
                if attention.PART in parts:
                    report.add(worker.call("check"))
                    report.add(worker.call("lines", rates, not sizes.options.tiny))
                if attention.TILINGS in parts:
                    report.add(worker.call("tilings", rates))
            except RuntimeError as error:
                report.fail(worker.name, error)


if __name__ == "__main__":
    typer.run(main)
