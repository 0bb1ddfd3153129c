"""The demo from start to end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from vllm_medusa.demo.artifacts import Artifacts, DemoSettings
from vllm_medusa.demo.contenders import (
    NATIVE_CHAIN,
    PLAIN,
    TREE,
    TREE_WIDE,
    Comparison,
    Models,
    compare,
    fastest_dtype,
)
from vllm_medusa.demo.engine import Order
from vllm_medusa.demo.report import draw, print_table, summarise, write_results
from vllm_medusa.tree.static import best_first

NODES = {TREE: 5, TREE_WIDE: 31}
"""Rows cost compute on a CPU: the small tree, of as many rows as one tile of oneDNN's AVX2 product takes, is the fast
one; the wide one shows what a tree is worth where rows are nearly free."""

EXACT_PROMPTS = 32
TOKENS = 64


def run_demo(directory: Path, rounds: int) -> None:
    """Train what is not there yet, compare, report."""
    disable_progress_bar()  # Those of loading and saving would cut through ours.
    console = Console()
    artifacts = Artifacts(directory, DemoSettings())
    small = Models(artifacts.target, artifacts.heads)
    large = Models(artifacts.padded_target, artifacts.padded_heads)
    accuracies = artifacts.accuracies
    console.print("Heads' top-1 accuracy: " + ", ".join(f"{value:.2f}" for value in accuracies[:, 0].tolist()))

    held_out = artifacts.prompts(EXACT_PROMPTS + rounds)
    comparison = Comparison(
        small=small,
        large=large,
        dtype=fastest_dtype(),
        num_heads=len(accuracies),
        trees={name: best_first(accuracies, nodes).choices for name, nodes in NODES.items()},
        exact=Order(held_out[:EXACT_PROMPTS], TOKENS),
        rounds=[Order([prompt], TOKENS) for prompt in held_out[EXACT_PROMPTS:]],
    )
    runs = compare(comparison, (PLAIN, NATIVE_CHAIN, TREE, TREE_WIDE), directory / "logs", console)
    summary = summarise(runs, {PLAIN: 0, NATIVE_CHAIN: comparison.num_heads, **NODES})
    details = {
        "models": artifacts.describe(),
        "accuracies": accuracies.tolist(),
        "trees": comparison.trees,
        "timed_dtype": comparison.dtype,
        "tokens": TOKENS,
        "rounds": rounds,
    }
    write_results(directory / "results.json", summary, details)
    print_table(summary, console)
    note = f"{artifacts.describe()}; {comparison.threads} CPU threads, {comparison.dtype}, batch 1, greedy"
    console.print(f"Speed: {note}.")
    draw(directory / "results.png", summary, note)
    console.print(f"Written: {directory / 'results.json'}, {directory / 'results.png'}")
