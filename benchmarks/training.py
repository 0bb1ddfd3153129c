# SPDX-License-Identifier: Apache-2.0
"""Compare ways to train heads for the demo's target: whose text they learn from, and whether the target learns too.

    python benchmarks/training.py --output build/training.json

Three runs of as many steps: Medusa-1 on the corpus that the target was trained on, Medusa-1 on text that the target
wrote itself, and Medusa-2 (LoRA, distilled) on the same text. Judged on text that the target writes from held-out
prompts: each head's top-1 accuracy, and tokens per step in vLLM with a chain and with the best trees of 7 and 31 nodes.
Needs the models of ``make demo``; takes about 15 minutes on 2 CPU cores the first time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from vllm_medusa.demo.artifacts import Artifacts, DemoSettings

from vllm_medusa.demo.engine import Engine, Order, decode
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.versions import installed_versions

EXAMPLES = Path(__file__).parents[1] / "examples"
NODES = (7, 31)
PROMPTS, TOKENS = 192, 96
DISTILL = {"max-tokens": 160, "temperature": 0, "shard-size": 256}
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28}


@dataclass(frozen=True)
class Way:
    """A way to train."""

    title: str
    data: str
    options: dict[str, Any]


WAYS = {
    "medusa1_raw": Way("Medusa-1, raw corpus", "raw.jsonl", {"method": "medusa1"}),
    "medusa1_own": Way("Medusa-1, own text", "data", {"method": "medusa1"}),
    "medusa2_own": Way("Medusa-2, own text", "data", {"method": "medusa2", "distill": True}),
}


def main(
    directory: Annotated[Path, typer.Option(help="Where runs are kept; finished ones are not repeated.")] = Path(
        "build/training"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 200,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all numbers.")] = None,
) -> None:
    share_environment()
    artifacts = Artifacts(Path("build/demo"), DemoSettings())
    target = artifacts.target
    if not (directory / "raw.jsonl").exists():
        run([sys.executable, str(EXAMPLES / "standard_library_text.py"), str(target), str(directory)])
    distill = ["distill", str(directory / "prompts.jsonl"), *flags({"model": target, "output": directory / "data"})]
    medusa([*distill, *flags(DISTILL), "--engine-args", json.dumps(ENGINE)])
    order = Order(artifacts.prompts(PROMPTS), TOKENS)
    found = {name: judge(name, way, target, directory, steps, order) for name, way in WAYS.items()}
    show(found)
    if output is not None:
        details = {"machine": machine(), "versions": installed_versions(), "command": sys.argv, "steps": steps}
        output.write_text(json.dumps(details | {"runs": found}, indent=2) + "\n")


def judge(name: str, way: Way, target: Path, directory: Path, steps: int, order: Order) -> dict[str, Any]:
    """Train one way, then measure its heads with the target that they serve."""
    trained = directory / name
    if not (trained / "results.json").exists():
        options = {"target": target, "data": directory / way.data, "output": trained, "steps": steps, **way.options}
        shape = {"block-length": 192, "batch-size": 8, "learning-rate": 3e-3}
        medusa(["train", *flags(options), *flags(shape)])
    served = trained / "target" if (trained / "target").exists() else target
    heads, evaluation = trained / "heads", trained / "eval.json"
    measured = {"model": served, "heads": heads, "prompts": directory / "held_out.jsonl", "output": evaluation}
    medusa(["eval", *flags(measured), "--write"])
    trees = {"chain": {"medusa_tree": "chain"}}
    trees |= {f"{nodes} nodes": {"medusa_tree": "sparse", "num_speculative_tokens": nodes} for nodes in NODES}
    tokens_per_step = {}
    for tree, options in trees.items():
        engine = Engine(str(served), "float32", {"method": "medusa", "model": str(heads), **options})
        with Contender(
            f"{name}-{tree}", answer, (engine, order), {}, directory / "logs" / f"{name}-{tree}.log"
        ) as each:
            decoded = each.answer()
        tokens_per_step[tree] = 1 + decoded.accepted / decoded.drafts
    results = json.loads((trained / "results.json").read_text())
    top_k = json.loads(evaluation.read_text())["top_k"]
    return {
        "title": way.title,
        "top1": [ranks[0] for ranks in top_k],
        "tokens_per_step": tokens_per_step,
        "target_lm_loss": [results[when]["lm_loss"] for when in ("before", "after")] if results["before"] else None,
    }


def answer(connection: Connection, engine: Engine, order: Order) -> None:
    """Decode once, in a process of its own."""
    connection.send(decode(engine.open(), order))


def flags(options: dict[str, Any]) -> list[str]:
    """Write options as the command line takes them."""
    return [
        part
        for name, value in options.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def medusa(arguments: list[str]) -> None:
    run([sys.executable, "-m", "vllm_medusa.cli", *arguments])


def run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())})


def show(found: dict[str, dict[str, Any]]) -> None:
    first = next(iter(found.values()))
    table = Table(title="Text that the target itself writes from held-out prompts")
    table.add_column("")
    for head in range(len(first["top1"])):
        table.add_column(f"head {head + 1}", justify="right")
    for tree in first["tokens_per_step"]:
        table.add_column(f"tokens/step, {tree}", justify="right")
    table.add_column("target's LM loss", justify="right")
    for each in found.values():
        loss = each["target_lm_loss"]
        table.add_row(
            each["title"],
            *(f"{value:.3f}" for value in each["top1"]),
            *(f"{value:.2f}" for value in each["tokens_per_step"].values()),
            "unchanged" if loss is None else f"{loss[0]:.4f} -> {loss[1]:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
