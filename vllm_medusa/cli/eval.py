# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa eval``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.data.record_files import BadLines
from vllm_medusa.distillation.dialogue import PromptStyle
from vllm_medusa.files import require_writable


def evaluate(
    model: Annotated[str, typer.Option(help="The target: a directory, or a repository on the Hugging Face Hub.")],
    heads: Annotated[Path, typer.Option(help="The heads' directory, as training or convert wrote it.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Files of prompts for the target to continue: .jsonl, or .txt with one per line."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of prompts: text that the target has written, such as distill's OUTPUT."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens that the target writes after a prompt.")] = 128,
    max_length: Annotated[int, typer.Option(min=2, help="The longest text, in tokens.")] = 2048,
    ranks: Annotated[int, typer.Option(min=1, help="How many of each head's most probable tokens are counted.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 8,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="The dtype of the target's weights. bfloat16 is slow on CPUs without instructions for it."),
    ] = "auto",
    style: Annotated[
        PromptStyle | None,
        typer.Option(help="Answer prompts in the chat template, or continue them. Default: chat if there is one."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip and count lines that are not valid instead of refusing them.")
    ] = False,
    lookup: Annotated[
        bool, typer.Option(help="Also draft what followed a path earlier in the text, or measure the heads alone.")
    ] = True,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the tree to write. Default: num_speculative_tokens at serving.")
    ] = None,
    write: Annotated[
        bool,
        typer.Option("--write", help="Write tree, accuracies, temperatures and weights into the heads' config.json."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the target's repository.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for the plot.")] = None,
) -> None:
    """Measure heads on held-out text, and grow the best trees."""
    with one_line_errors():
        from rich.console import Console
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from vllm_medusa.checkpoint.entries import read_entries
        from vllm_medusa.checkpoint.format import CONFIG_FILE
        from vllm_medusa.checkpoint.hub import local_directory
        from vllm_medusa.evaluation.calibration import Calibration, write_calibration
        from vllm_medusa.evaluation.measure import evaluate_heads, load_heads
        from vllm_medusa.evaluation.plots import draw
        from vllm_medusa.evaluation.report import TREE_SIZES, print_tables, write_results
        from vllm_medusa.evaluation.text import Sources, held_out_samples
        from vllm_medusa.tree.best_first import available_nodes
        from vllm_medusa.tree.static import MAX_NODES

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        _check_outputs(output, plot, heads / CONFIG_FILE if write and heads.is_dir() else None)
        bad_lines = BadLines.from_flag(skip_bad)
        sources = Sources(tuple(prompts or ()), tuple(data or ()), style, bad_lines, new_tokens, max_length)
        directory = local_directory(model)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        target = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map="auto", trust_remote_code=trust_remote_code
        ).eval()
        loaded_heads = load_heads(heads, directory, target, trust_remote_code=trust_remote_code)
        num_heads = loaded_heads.spec.num_heads
        most = min(MAX_NODES, available_nodes(num_heads, ranks))
        if nodes is not None and nodes > most:
            raise ValueError(
                f"{num_heads} heads and --ranks {ranks} give trees of up to {most} nodes, got --nodes {nodes}"
            )
        samples = held_out_samples(target, tokenizer, sources, batch_size)
        scale = read_entries(heads / CONFIG_FILE).get("logit_scale", 1.0)
        evaluation = evaluate_heads(target, loaded_heads, samples, ranks, batch_size, logit_scale=scale, lookup=lookup)
        grown = max(nodes or 0, *TREE_SIZES)
        calibration = Calibration.of(
            evaluation.accuracies, evaluation.paths, evaluation.temperatures, evaluation.lookup_weights, grown
        )
        print_tables(evaluation, calibration, Console())
        if output is not None:
            details = {"model": model, "heads": str(heads), "texts": len(samples)}
            write_results(output, evaluation, calibration, details)
        if plot is not None:
            draw(plot, evaluation, calibration)
        if write:
            write_calibration(heads, calibration, nodes)
            tree = "of num_speculative_tokens nodes" if nodes is None else f"of {nodes} nodes"
            *others, last = (name for name in calibration.entries(nodes) if name != "medusa_tree")
            typer.echo(f"{heads}: wrote {', '.join(others)} and {last}, and as medusa_tree the best tree {tree}")


def _check_outputs(output: Path | None, plot: Path | None, config: Path | None) -> None:
    """Raise an error before the measurement if its results could not be written."""
    for path in (output, plot, config):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written, there is no directory {path.parent}; create it first")
        require_writable(path)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; install vllm-medusa[train]")
