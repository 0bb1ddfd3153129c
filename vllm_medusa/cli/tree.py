# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa tree``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_medusa.cli.errors import one_line_errors

if TYPE_CHECKING:
    from vllm_medusa.budget.store import Costs
    from vllm_medusa.evaluation.shown_trees import JudgedTree, TreeCost

DEFAULT_NODES = 16


def tree(
    heads: Annotated[Path, typer.Option(help="The heads' directory; eval --write puts their accuracies there.")],
    trees: Annotated[
        list[str] | None,
        typer.Argument(help='"sparse", "chain", a product "[4, 2, 2]", choices "[[0], [0, 0], [1]]", or a JSON file.'),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help=f"Nodes that trees are cut to. Default: {DEFAULT_NODES}, of sparse trees.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests at once, for what a step costs.")] = 1,
    output: Annotated[Path | None, typer.Option(help="A JSON file of the first tree, for medusa_tree.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for the trees.")] = None,
) -> None:
    """Show trees, their promised tokens per step, and their costs."""
    with one_line_errors():
        from rich.console import Console

        from vllm_medusa.evaluation.shown_trees import draw, judge, print_trees
        from vllm_medusa.files import require_writable, write_json

        for path in (output, plot):
            if path is not None:
                require_writable(path)
        judged = judge(heads, trees or ["sparse"], nodes, DEFAULT_NODES)
        console = Console()
        costs = _known_costs(heads)
        print_trees(judged, [_cost(costs, each, requests) for each in judged] if costs else None, console)
        console.print(_in_words(costs, requests), highlight=False, soft_wrap=True)
        if output is not None:
            write_json(output, {"medusa_tree": judged[0].tree.choices})
            console.print(f"Written: {output}", highlight=False)
        if plot is not None:
            draw(plot, judged)
            console.print(f"Written: {plot}", highlight=False)


def _known_costs(heads: Path) -> Costs | None:
    """Return what an engine with these heads has measured on this machine; None if none has."""
    from vllm import envs

    from vllm_medusa.attention.cpu.build import cpu_description
    from vllm_medusa.budget.store import costs_directory, find_costs, name_of

    directory = costs_directory(envs.VLLM_CACHE_ROOT)
    return find_costs(directory, {"heads": name_of(str(heads)), "cpu": cpu_description()})


def _cost(costs: Costs, judged: JudgedTree, requests: int) -> TreeCost:
    from vllm_medusa.budget.cost import CostTable
    from vllm_medusa.evaluation.shown_trees import TreeCost

    rows = requests * (1 + judged.tree.num_nodes)
    step = CostTable(costs.verification, rows)
    return TreeCost(step.at(rows) + CostTable(costs.proposal, requests).at(requests), step.at(requests))


def _in_words(costs: Costs | None, requests: int) -> str:
    """Say of what engine the costs are, or why there are none."""
    if costs is None:
        return (
            "No costs: no engine with these heads has measured its steps on this machine; one with medusa_budget "
            '"auto" does so as it starts.'
        )
    engine = costs.engine
    return (
        f"Steps of {requests} request{'s' * (requests > 1)}, by the costs of {engine['target']} ({engine['dtype']}, "
        f"{engine['threads']} threads), measured for a {engine['tree']}, without attention; tokens/s against plain "
        "decoding."
    )
