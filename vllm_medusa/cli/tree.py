# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa tree``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_medusa.cli.errors import one_line_errors

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
    output: Annotated[Path | None, typer.Option(help="A JSON file of the first tree, for medusa_tree.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for the trees.")] = None,
) -> None:
    """Show trees, and the tokens per step that they promise."""
    with one_line_errors():
        from rich.console import Console

        from vllm_medusa.evaluation.shown_trees import draw, judge, print_trees
        from vllm_medusa.files import require_writable, write_json

        for path in (output, plot):
            if path is not None:
                require_writable(path)
        judged = judge(heads, trees or ["sparse"], nodes, DEFAULT_NODES)
        console = Console()
        print_trees(judged, console)
        if output is not None:
            write_json(output, {"medusa_tree": judged[0].tree.choices})
            console.print(f"Written: {output}", highlight=False)
        if plot is not None:
            draw(plot, judged)
            console.print(f"Written: {plot}", highlight=False)
