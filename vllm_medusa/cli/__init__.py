# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-medusa`` command. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import typer

from vllm_medusa.cli.convert import convert
from vllm_medusa.cli.demo import demo
from vllm_medusa.cli.distill import distill
from vllm_medusa.cli.eval import evaluate
from vllm_medusa.cli.fetch_demo import fetch_demo
from vllm_medusa.cli.train import train
from vllm_medusa.cli.tree import tree

# Plain help: the boxes of rich cut the names of options short on a terminal of 80 columns.
app = typer.Typer(name="vllm-medusa", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(demo)
app.command("fetch-demo")(fetch_demo)
app.command()(train)
app.command()(convert)
app.command()(distill)
app.command("eval")(evaluate)
app.command()(tree)


@app.callback()
def main() -> None:
    """Medusa heads and draft trees for stock vLLM."""
