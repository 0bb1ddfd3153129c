# SPDX-License-Identifier: Apache-2.0
"""What trees of sequential heads lose by a beam: tokens per step on held-out text, against the best-first tree.

A beam of as many nodes as the tree has finds the best-first tree: no depth of that tree has more nodes.
docs/training.md has what it printed.

    python benchmarks/beam.py --target TARGET --heads HEADS --data HELD_OUT.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from path_scores import RANKS, read_held_out
from vllm_medusa.evaluation.measure import where_steps_begin
from vllm_medusa.evaluation.reliability import Positions, draft_reliability
from vllm_medusa.progress import track
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.options import DYNAMIC_TOP_K

NODES = (7, 31, 63)
BEAMS = (2, 4, 8, 16)


@torch.no_grad()
def main(
    target: Annotated[Path, typer.Option(help="The target's directory.")],
    heads: Annotated[Path, typer.Option(help="Its sequential heads.")],
    data: Annotated[Path, typer.Option(help="Text that the target wrote, such as a file of distill's OUTPUT.")],
    texts: Annotated[int, typer.Option(min=1, help="Texts to judge by.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = 512,
) -> None:
    served, read = read_held_out(target, heads, data, texts, max_length)
    begins = where_steps_begin(read, RANKS)
    positions = Positions.cat([text.at.where(of[text.kept]) for text, of in zip(read, begins, strict=True)])

    table = Table(title=f"Accepted tokens per step at {len(positions.roots)} positions, and against best-first")
    for column in ("nodes", *(f"beam {each}" for each in BEAMS), "best-first"):
        table.add_column(column, justify="right")
    num_heads = served.heads.spec.num_heads
    for size in track(list(NODES), "Trees"):
        found = {
            width: draft_reliability(served, BeamTree(num_heads, size, DYNAMIC_TOP_K, width, 0.0), positions)
            for width in (*(each for each in BEAMS if each < size), size)
        }
        exact = found[size].acceptance_length
        lengths = {width: each.acceptance_length for width, each in found.items()}
        cells = [f"{lengths[w]:.3f} ({lengths[w] / exact - 1:+.1%})" if w in lengths else "" for w in BEAMS]
        table.add_row(str(size), *cells, f"{exact:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
