# SPDX-License-Identifier: Apache-2.0
"""What a proposal takes by heads, lookup, nodes of a dynamic tree and requests, as a share of a step of plain decoding.

Before each proposal the target runs once, as in serving, so that the heads' weights are no more in the caches than
there. Times are medians. docs/benchmarks.md has what it printed.

    python benchmarks/proposal_cost.py --dtype float32
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.demo.contenders import fastest_dtype
from vllm_medusa.demo.engine import Engine
from vllm_medusa.demo.places import HEADS, MODEL, NATIVE_HEADS
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.progress import track

TEXT_LENGTH = 512
"""Tokens of the text in which paths are looked up."""

NODES = (4, 7, 15, 31, 63)
REQUESTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Times:
    """Milliseconds for a number of requests.

    Attributes:
        step: the target's step without drafts.
        proposals: by nodes.

    """

    step: float
    proposals: dict[int, float]


def main(
    target: Annotated[Path, typer.Option(help="The target's directory.")] = MODEL,
    heads: Annotated[list[Path] | None, typer.Option(help="May repeat. Default: both of the demo's.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 if the CPU has it, else float32.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = machine()["cores"],
) -> None:
    share_environment()
    dtype = dtype or fastest_dtype()
    table = Table(title=f"ms of a proposal, and its share of a step; {dtype}, {threads} threads")
    for column in ("heads", "requests", "step", *(f"{nodes} nodes" for nodes in NODES)):
        table.add_column(column, justify="right")
    for each, looks_up in product(heads or (NATIVE_HEADS, HEADS), (False, True)):
        options = {"medusa_tree": "dynamic", "num_speculative_tokens": max(NODES), "medusa_budget": "off"}
        medusa = {"method": "medusa", "model": str(each), "medusa_lookup": looks_up, **options}
        engine, name = Engine(str(target), dtype, medusa), f"{each.name}{', lookup' if looks_up else ''}"
        log = Path("build/proposal_cost") / f"{name.replace(', ', '_')}.log"
        with Contender(name, serve, (engine, threads, rounds), {"VLLM_PLUGINS": "medusa"}, log) as contender:
            for num_reqs in track(list(REQUESTS), name):
                times: Times = contender.ask(num_reqs)
                cells = (f"{ms:.1f} ({ms / times.step:.0%})" for ms in times.proposals.values())
                table.add_row(name, str(num_reqs), f"{times.step:.1f}", *cells)
    console = Console(width=140)
    console.print(machine())
    console.print(table)


def serve(connection: Connection, engine: Engine, threads: int, rounds: int) -> None:
    """Answer each number of requests with its ``Times``."""
    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm: Any = engine.open()
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    while True:
        connection.send(measure(runner, connection.recv(), rounds))


def measure(runner: Any, num_reqs: int, rounds: int) -> Times:
    """Time trees of all sizes in turns."""
    import torch

    from vllm_medusa.tree.options import TreeOptions

    proposer = runner.drafter
    spec = proposer.model.spec
    trees = {
        nodes: TreeOptions(
            num_heads=spec.num_heads,
            vocab_size=spec.lm_head_rows,
            accuracies=None,
            num_nodes=nodes,
            default_num_nodes=nodes,
            top_k=None,
            min_probability=None,
            by_level=proposer.reads_roots,
        ).dynamic()
        for nodes in NODES
    }
    hidden = torch.randn(num_reqs, spec.hidden_size, dtype=runner.dtype)
    roots = torch.randint(spec.vocab_size, (num_reqs,))
    text = torch.randint(spec.vocab_size, (num_reqs, TEXT_LENGTH), dtype=torch.int32) if proposer.looks_up else None

    def step() -> None:
        states, _ = runner._dummy_run(num_reqs, is_profile=True, skip_eplb=True)
        runner.model.compute_logits(states[:num_reqs]).argmax(dim=-1)

    steps: list[float] = []
    proposals: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    with torch.inference_mode():
        for _ in range(rounds):
            for nodes, tree in trees.items():
                steps.append(timed(step))
                proposer.tree = tree
                proposals[nodes].append(timed(lambda: proposer.propose(hidden, roots, text)))
    return Times(statistics.median(steps), {nodes: statistics.median(own) for nodes, own in proposals.items()})


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    typer.run(main)
