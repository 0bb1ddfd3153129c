# SPDX-License-Identifier: Apache-2.0
"""The demo: build the models, compare the contenders, report."""

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

DYNAMIC = {"medusa_tree": "dynamic", "num_speculative_tokens": 6}
"""A small tree of each step's most probable nodes, since on a CPU every row costs compute."""

WIDE_NODES = 31
"""Nodes of the tree that shows the tokens per step that are possible where rows are nearly free."""

EXACT_PROMPTS = 32
TOKENS = 64


def run_demo(directory: Path, rounds: int) -> None:
    disable_progress_bar()  # The bars of loading and saving would interrupt ours.
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
        trees={TREE: DYNAMIC, TREE_WIDE: {"medusa_tree": best_first(accuracies, WIDE_NODES).choices}},
        exact=Order(held_out[:EXACT_PROMPTS], TOKENS),
        rounds=[Order([prompt], TOKENS) for prompt in held_out[EXACT_PROMPTS:]],
    )
    runs = compare(comparison, (PLAIN, NATIVE_CHAIN, TREE, TREE_WIDE), directory / "logs")
    summary = summarise(runs)
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
