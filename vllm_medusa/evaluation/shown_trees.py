# SPDX-License-Identifier: Apache-2.0
"""Trees of fixed shape for people: as text, as a plot, and by what they promise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree as Branches

from vllm_medusa.checkpoint.entries import paths_of, read_entries
from vllm_medusa.checkpoint.format import CONFIG_FILE, HeadsSpec
from vllm_medusa.files import replaced_file
from vllm_medusa.tree.best_first import path_probabilities
from vllm_medusa.tree.options import TreeOptions
from vllm_medusa.tree.static import StaticTree

MOST_SHOWN = 64
"""Nodes of a tree that is still shown as text."""


@dataclass(frozen=True, eq=False)
class JudgedTree:
    """A tree and what the heads' accuracies say of it.

    Attributes:
        name: what was asked for.
        tree: the tree.
        probabilities: how often each node is accepted, in the tree's order.

    """

    name: str
    tree: StaticTree
    probabilities: list[float]

    @property
    def tokens_per_step(self) -> float:
        return 1 + sum(self.probabilities)


@dataclass(frozen=True)
class TreeCost:
    """What a step takes.

    Attributes:
        seconds: that verifies a tree for each request, and drafts the next ones.
        plain_seconds: without speculation.

    """

    seconds: float
    plain_seconds: float


def judge(heads: Path, wanted: Sequence[str], nodes: int | None, default_nodes: int) -> list[JudgedTree]:
    """Build trees as an engine does, and judge them.

    Args:
        heads: the heads' directory.
        wanted: each tree as the command line gives it.
        nodes: most nodes of a tree.
        default_nodes: those of a sparse tree if ``nodes`` is None.

    Raises:
        ValueError: a tree or an accuracy is wrong, or a tree has no fixed shape.
        OSError: the heads' ``config.json`` cannot be read.

    """
    entries = read_entries(heads / CONFIG_FILE)
    spec = HeadsSpec.from_config(entries)
    options = TreeOptions(
        num_heads=spec.num_heads,
        vocab_size=spec.lm_head_rows,
        accuracies=entries.get("medusa_accuracies"),
        num_nodes=nodes,
        default_num_nodes=default_nodes,
        top_k=None,
        min_probability=None,
        by_level=spec.path_rank is not None,
        path_accuracies=paths_of(entries.get("medusa_path_accuracies") or {}),
    )
    judged = []
    for name in wanted:
        tree = options.build(parsed(name))
        if not isinstance(tree, StaticTree):
            raise ValueError(f'{name}: a tree that is grown anew for each step has no shape to show; give "sparse"')
        judged.append(JudgedTree(name, tree, path_probabilities(tree, options.accuracies_of(tree))))
    return judged


def parsed(name: str) -> Any:
    """Return a list as a list, and other words as they are."""
    try:
        return json.loads(name) if name.lstrip().startswith("[") else name
    except ValueError as error:
        raise ValueError(f"{name} is no list: {error}; give one such as [4, 2, 2]") from error


def print_trees(judged: Sequence[JudgedTree], costs: Sequence[TreeCost] | None, console: Console) -> None:
    """Print each tree, then a table of all, with each tree's costs where they are known."""
    for each in judged:
        if each.tree.num_nodes <= MOST_SHOWN:
            console.print(branches(each), highlight=False)
    table = Table()
    for column in ("tree", "nodes", "depth", "tokens/step", *(("ms/step", "tokens/s") if costs else ())):
        table.add_column(column, justify="left" if column == "tree" else "right")
    for index, each in enumerate(judged):
        cells = [each.name, str(each.tree.num_nodes), str(each.tree.depth), f"{each.tokens_per_step:.2f}"]
        if costs is not None:
            times_plain = each.tokens_per_step * costs[index].plain_seconds / costs[index].seconds
            cells += [f"{1e3 * costs[index].seconds:.1f}", f"{times_plain:.2f}x"]
        table.add_row(*cells)
    console.print(table)


def branches(judged: JudgedTree) -> Branches:
    """Return a tree for the terminal: each node's rank and how often it is accepted."""
    shown = [Branches(f"{judged.name}: rank among its head's tokens, how often it is accepted")]
    parents = judged.tree.topology.parents.tolist()
    for row, (choice, probability) in enumerate(zip(judged.tree.choices, judged.probabilities, strict=True), start=1):
        shown.append(shown[parents[row]].add(f"{choice[-1]}  {probability:.3f}"))
    return shown[0]


def draw(path: Path, judged: Sequence[JudgedTree]) -> None:
    """Draw the trees side by side: a level a depth, the more often a node is accepted the darker."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(judged), 4), layout="constrained")
    for axis, each in zip(figure.subplots(1, len(judged), squeeze=False)[0], judged, strict=True):
        parents, depths = each.tree.topology.parents.tolist(), each.tree.topology.depths.tolist()
        across = places(parents)
        for row in range(1, len(parents)):
            ends = (parents[row], row)
            axis.plot([across[end] for end in ends], [depths[end] for end in ends], color="#9aa5b1", linewidth=0.8)
        accepted = [1.0, *each.probabilities]
        axis.scatter(across, depths, c=accepted, cmap="YlGn", vmin=0, vmax=1, edgecolors="#2a9d8f", zorder=2)
        axis.invert_yaxis()
        axis.set_title(f"{each.name}: {each.tree.num_nodes} nodes, {each.tokens_per_step:.2f} tokens/step", fontsize=9)
        axis.set_yticks(range(max(depths) + 1))
        axis.set_ylabel("depth")
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    with replaced_file(path, "wb") as stream:
        figure.savefig(stream, dpi=150, format="png")


def places(parents: Sequence[int]) -> list[float]:
    """Return where each row stands across: leaves side by side, every other one in the middle of its children."""
    children: list[list[int]] = [[] for _ in parents]
    for row in range(1, len(parents)):
        children[parents[row]].append(row)
    across = [0.0] * len(parents)
    leaves = 0
    waiting = [(0, False)]
    while waiting:
        row, seen = waiting.pop()
        if not children[row]:
            across[row], leaves = float(leaves), leaves + 1
        elif seen:
            across[row] = sum(across[child] for child in children[row]) / len(children[row])
        else:
            waiting += [(row, True), *((child, False) for child in reversed(children[row]))]
    return across
