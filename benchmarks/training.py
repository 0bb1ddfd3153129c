# SPDX-License-Identifier: Apache-2.0
"""Compare ways to train heads for a target: whose text they learn from, and whether the target learns too.

    python benchmarks/training.py --target TARGET --raw RAW --prompts PROMPTS --held-out HELD_OUT --output training.json

Three runs of as many steps: Medusa-1 on text that others wrote (RAW), Medusa-1 on text that the target writes from
PROMPTS, and Medusa-2 (LoRA, distilled) on the same text. Judged on text that the target writes from held-out prompts:
each head's top-1 accuracy, and tokens per step in vLLM with a chain and with the best trees of 7 and 31 nodes.
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
from transformers import AutoTokenizer

from vllm_medusa.data.chat import encode_prompt
from vllm_medusa.data.prompts import read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.demo.engine import Engine, Order, decode
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.versions import installed_versions

NODES = (7, 31)
TOKENS = 96
DISTILL = {"max-tokens": 160, "temperature": 0, "shard-size": 256}
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28}


@dataclass(frozen=True)
class Way:
    """A way to train."""

    title: str
    data: Path
    options: dict[str, Any]


@dataclass(frozen=True)
class Held:
    """Held-out prompts: their file, and the same as an engine's order."""

    file: Path
    order: Order


def main(
    target: Annotated[Path, typer.Option(help="The target's directory, with a tokenizer.")],
    raw: Annotated[Path, typer.Option(help="Records of text that others wrote.")],
    prompts: Annotated[Path, typer.Option(help="Prompts from which the target writes text to train on.")],
    held_out: Annotated[Path, typer.Option(help="Prompts from which it writes text to judge by.")],
    directory: Annotated[Path, typer.Option(help="Where runs are kept; finished ones are not repeated.")] = Path(
        "build/training"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 200,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all numbers.")] = None,
) -> None:
    share_environment()
    own = directory / "data"
    distill = ["distill", str(prompts), *flags({"model": target, "output": own})]
    medusa([*distill, *flags(DISTILL), "--engine-args", json.dumps(ENGINE)])
    ways = {
        "medusa1_raw": Way("Medusa-1, raw text", raw, {"method": "medusa1"}),
        "medusa1_own": Way("Medusa-1, own text", own, {"method": "medusa1"}),
        "medusa2_own": Way("Medusa-2, own text", own, {"method": "medusa2", "distill": True}),
    }
    held = Held(held_out, order_of(held_out, target))
    found = {name: judge(name, way, target, directory, steps, held) for name, way in ways.items()}
    show(found)
    if output is not None:
        details = {"machine": machine(), "versions": installed_versions(), "command": sys.argv, "steps": steps}
        output.write_text(json.dumps(details | {"runs": found}, indent=2) + "\n")


def order_of(file: Path, target: Path) -> Order:
    """Return the prompts of a file as the target reads them, in its chat template if it has one."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [prompt.first_user_message for _, prompt in read_prompts([file], BadLineCounter(BadLines.REFUSE))]
    if tokenizer.chat_template:
        return Order([encode_prompt(tokenizer, [prompt]) for prompt in prompts], TOKENS, (tokenizer.eos_token_id,))
    return Order([tokenizer(prompt.content)["input_ids"] for prompt in prompts], TOKENS)


def judge(name: str, way: Way, target: Path, directory: Path, steps: int, held: Held) -> dict[str, Any]:
    """Train one way, then measure its heads with the target that they serve."""
    trained = directory / name
    if not (trained / "results.json").exists():
        options = {"target": target, "data": way.data, "output": trained, "steps": steps, **way.options}
        shape = {"block-length": 192, "batch-size": 8, "learning-rate": 3e-3}
        medusa(["train", *flags(options), *flags(shape)])
    served = trained / "target" if (trained / "target").exists() else target
    heads, evaluation = trained / "heads", trained / "eval.json"
    measured = {"model": served, "heads": heads, "prompts": held.file, "output": evaluation}
    medusa(["eval", *flags(measured), "--write"])
    trees = {"chain": {"medusa_tree": "chain"}}
    trees |= {f"{nodes} nodes": {"medusa_tree": "sparse", "num_speculative_tokens": nodes} for nodes in NODES}
    whole = {"medusa_budget": "off"}
    tokens_per_step = {}
    for tree, options in trees.items():
        engine = Engine(str(served), "float32", {"method": "medusa", "model": str(heads), **options, **whole})
        with Contender(
            f"{name}-{tree}", answer, (engine, held.order), {}, directory / "logs" / f"{name}-{tree}.log"
        ) as each:
            decoded = each.answer()
        tokens_per_step[tree] = decoded.tokens_per_step
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
    *_, decoded = decode(engine.open(), order)
    connection.send(decoded)


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
