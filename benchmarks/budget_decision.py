# SPDX-License-Identifier: Apache-2.0
"""What the budget takes in a step on V1: to cut all drafts, and to learn from the rows that were verified.

Drafts are made up, as are costs: rows are cheap, so that all of a draft's nodes may be verified, or dear. Times are
medians, on one thread. docs/benchmarks.md has what it printed.

    python benchmarks/budget_decision.py
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_medusa.budget.budget import Budget
from vllm_medusa.budget.cost import Curve
from vllm_medusa.budget.store import Costs
from vllm_medusa.demo.report import machine
from vllm_medusa.tree.drafts import Drafts

REQUESTS = (1, 4, 16, 64)
CHEAP, DEAR = 1e-6, 1e-2
"""Seconds of a further row; those of a step are 0.1."""


def main(
    requests: Annotated[list[int] | None, typer.Option(min=1, help=f"May repeat. Default: {REQUESTS}.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a draft.")] = 63,
    rounds: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    torch.set_num_threads(1)
    table = Table(title=f"The budget's decision, {nodes} nodes a request, ms of a step")
    for column in ("requests", "rows are", "rows a step", "cut", "learn"):
        table.add_column(column, justify="right")
    for num_reqs in requests or REQUESTS:
        for name, row in (("cheap", CHEAP), ("dear", DEAR)):
            rows, cut, learn = measure(num_reqs, nodes, row, rounds)
            table.add_row(str(num_reqs), name, f"{rows:.0f}", f"{cut:.2f}", f"{learn:.2f}")
    console = Console()
    console.print(machine())
    console.print(table)


def measure(num_reqs: int, nodes: int, row: float, rounds: int) -> tuple[float, float, float]:
    """Return the rows of a step, and the milliseconds of its two parts."""
    most = num_reqs * (nodes + 1)
    budget = Budget(max_depth=(nodes + 1).bit_length())
    verification = Curve(sizes=(1, most), seconds=(0.1, 0.1 + row * most))
    budget.know(Costs(verification=verification, proposal=Curve(sizes=(1,), seconds=(1e-6,))), most, num_reqs)
    names = [str(index) for index in range(num_reqs)]
    emitting = torch.ones(num_reqs, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    rows, cuts, learns = [], [], []
    for _ in range(rounds):
        probabilities = torch.rand(num_reqs, nodes, generator=generator).sort(dim=1, descending=True).values
        drafts = Drafts(
            tokens=torch.zeros(num_reqs, nodes, dtype=torch.int64),
            parents=(torch.arange(nodes) // 2).expand(num_reqs, -1).contiguous(),  # A binary tree.
            lengths=torch.full((num_reqs,), nodes),
            log_probs=probabilities.log(),
        )
        start = time.perf_counter()
        budget.asks_heads(num_reqs)
        lengths = budget.cut(names, drafts, emitting).lengths.numpy()
        cuts.append(time.perf_counter() - start)
        request = np.repeat(np.arange(num_reqs), lengths + 1)
        node = np.concatenate([np.arange(length + 1) for length in lengths]) - 1
        depths = np.log2(node + 2).astype(np.int64)
        accepted = (torch.rand(len(node), generator=generator) < probabilities[request, node]).numpy()
        start = time.perf_counter()
        budget.verified(names, request, node, depths, accepted)
        learns.append(time.perf_counter() - start)
        rows.append(len(node))
    cut, learn = (statistics.median(each) * 1e3 for each in (cuts, learns))
    return statistics.mean(rows), cut, learn


if __name__ == "__main__":
    typer.run(main)
