# SPDX-License-Identifier: Apache-2.0
"""Show an evaluation as tables, a JSON file, and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vllm_medusa.evaluation.calibration import Calibration
from vllm_medusa.evaluation.measure import Evaluation
from vllm_medusa.files import replaced_file, write_json

SHOWN_RANKS = (1, 2, 3, 5, 10)
"""The ranks in the table of accuracies."""

TREE_SIZES = (4, 8, 16, 32, 64)
"""The numbers of nodes of the shown trees."""


@dataclass(frozen=True)
class _TreeRow:
    kind: Literal["chain", "best"]
    nodes: int
    depth: int
    tokens_per_step: float


def print_tables(evaluation: Evaluation, calibration: Calibration, console: Console) -> None:
    """Print each head's accuracies, and the expected tokens per step with the chain and with the best trees."""
    ranks = [rank for rank in SHOWN_RANKS if rank <= len(evaluation.accuracies[0])]
    accuracies = Table(title="Right token among a head's first")
    for column in ("head", *map(str, ranks), "positions"):
        accuracies.add_column(column, justify="right")
    for head, (top_k, positions) in enumerate(zip(evaluation.top_k, evaluation.positions, strict=True), start=1):
        accuracies.add_row(str(head), *(f"{top_k[rank - 1]:.3f}" for rank in ranks), str(positions))
    console.print(accuracies)
    lengths = Table(title="Expected tokens per step")
    for column in ("tree", "nodes", "depth", "tokens/step"):
        lengths.add_column(column, justify="right")
    for tree in _trees(calibration):
        lengths.add_row(tree.kind, str(tree.nodes), str(tree.depth), f"{tree.tokens_per_step:.2f}")
    console.print(lengths)


def write_results(path: Path, evaluation: Evaluation, calibration: Calibration, details: Mapping[str, Any]) -> None:
    """Write the results as JSON, with ``medusa_accuracies`` as in the heads' ``config.json``, and ``details``."""
    results = {
        **details,
        "positions": evaluation.positions,
        "top_k": evaluation.top_k,
        "medusa_accuracies": evaluation.accuracies,
        "expected_acceptance_length": list(map(asdict, _trees(calibration))),
    }
    write_json(path, results)


def draw(path: Path, evaluation: Evaluation, calibration: Calibration) -> None:
    """Plot accuracy by head and rank, and the expected acceptance length by nodes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for head, top_k in enumerate(evaluation.top_k, start=1):
        left.plot(range(1, len(top_k) + 1), top_k, marker="o", markersize=3, label=f"head {head}")
    left.set(xlabel="first tokens of a head", ylabel="right token among them", ylim=(0, 1))
    left.legend()
    lengths = calibration.expected_lengths
    right.plot(range(1, len(lengths) + 1), lengths, label="best tree")
    right.plot(
        len(calibration.accuracies),
        calibration.expected_length_of_chain,
        "o",
        color="#9aa5b1",
        label="chain of all heads",
    )
    right.set(xlabel="nodes", ylabel="expected tokens per step", xscale="log", ylim=(1, None))
    ticks = [nodes for nodes in (1, 2, *TREE_SIZES) if nodes <= len(lengths)]
    right.set_xticks(ticks, list(map(str, ticks)))
    right.minorticks_off()
    right.legend()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    with replaced_file(path, "wb") as stream:
        figure.savefig(stream, dpi=150, format="png")
    pyplot.close(figure)


def _trees(calibration: Calibration) -> Iterator[_TreeRow]:
    heads = len(calibration.accuracies)
    yield _TreeRow("chain", heads, heads, calibration.expected_length_of_chain)
    lengths = calibration.expected_lengths
    for nodes in sorted({min(nodes, len(lengths)) for nodes in (*TREE_SIZES, len(lengths))}):
        yield _TreeRow("best", nodes, calibration.tree(nodes).depth, lengths[nodes - 1])
