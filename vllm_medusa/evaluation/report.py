# SPDX-License-Identifier: Apache-2.0
"""Show an evaluation as tables and as a JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vllm_medusa.evaluation.calibration import Calibration
from vllm_medusa.evaluation.measure import Evaluation
from vllm_medusa.evaluation.reliability import DraftReliability
from vllm_medusa.files import write_json

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
    """Print each head's accuracies, the expected tokens per step of the chain and of the best trees, and the scores."""
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
    console.print(_scores(evaluation))
    if evaluation.lookup_weights is not None:
        console.print(_lookup_weights(evaluation.lookup_weights))
    for when, drafts in (("without", evaluation.before), ("with", evaluation.after)):
        length, said = drafts.acceptance_length, drafts.predicted_length
        console.print(
            f"Dynamic trees {when} {calibrated_by(evaluation)}: {length:.2f} tokens/step, their scores say {said:.2f}."
        )


def calibrated_by(evaluation: Evaluation) -> str:
    """Say what the dynamic trees of ``Evaluation.after`` have that those of ``before`` have not."""
    return "temperatures" if evaluation.lookup_weights is None else "temperatures and lookup"


def _scores(evaluation: Evaluation) -> Table:
    """Compare what scores say with what is accepted, depth by depth, before and after."""
    table = Table(title=f"Scores of the nodes of dynamic trees, without and with {calibrated_by(evaluation)}")
    for column in ("depth", "T", *("score", "accepted", "error") * 2):
        table.add_column(column, justify="right")
    depths = zip(evaluation.temperatures, evaluation.before.depths, evaluation.after.depths, strict=False)
    for depth, (temperature, *both) in enumerate(depths, start=1):
        columns = (figure for each in both for figure in (each.score, each.accepted, each.calibration_error))
        table.add_row(str(depth), f"{temperature:.2f}", *(f"{figure:.4f}" for figure in columns))
    return table


def _lookup_weights(weights: list[list[float]]) -> Table:
    """Show how far what followed a path earlier in the text is trusted."""
    table = Table(title="Weight of what followed a match of so many tokens in the text")
    for column in ("head", *map(str, range(1, len(weights[0]) + 1))):
        table.add_column(column, justify="right")
    for head, of_lengths in enumerate(weights, start=1):
        table.add_row(str(head), *(f"{weight:.2f}" for weight in of_lengths))
    return table


def write_results(path: Path, evaluation: Evaluation, calibration: Calibration, details: Mapping[str, Any]) -> None:
    """Write the results as JSON, with the entries of the heads' ``config.json``, and ``details``."""
    results = {
        **details,
        "positions": evaluation.positions,
        "top_k": evaluation.top_k,
        **{name: value for name, value in calibration.entries(None).items() if name != "medusa_tree"},
        "expected_acceptance_length": list(map(asdict, _trees(calibration))),
        "scores": {"before": _figures(evaluation.before), "after": _figures(evaluation.after)},
    }
    write_json(path, results)


def _figures(drafts: DraftReliability) -> dict[str, Any]:
    depths = [
        {"expected_calibration_error": of_depth.calibration_error, **asdict(of_depth)} for of_depth in drafts.depths
    ]
    return {
        "predicted_length": drafts.predicted_length,
        "acceptance_length": drafts.acceptance_length,
        "depths": depths,
    }


def _trees(calibration: Calibration) -> Iterator[_TreeRow]:
    heads = len(calibration.accuracies)
    yield _TreeRow("chain", heads, heads, calibration.expected_length_of_chain)
    lengths = calibration.expected_lengths
    for nodes in sorted({min(nodes, len(lengths)) for nodes in (*TREE_SIZES, len(lengths))}):
        yield _TreeRow("best", nodes, calibration.tree(nodes).depth, lengths[nodes - 1])
