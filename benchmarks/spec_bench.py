# SPDX-License-Identifier: Apache-2.0
"""Speculation on questions in Spec-Bench's format: tokens per step and speed by category, against plain decoding.

A file has a question a line: ``{"question_id", "category", "turns": [...]}``. Each engine answers the turns one after
another through the model's chat template, greedily, with its own answers in between. Engines are processes of their
own and take turns, batch by batch; a batch has questions of one category. Without further options model, heads and
trees are the demo's. ``native_chain`` is vLLM's own Medusa without the plugin, and needs vLLM 0.32; it gets heads over
the whole vocabulary, which are derived once.

    python benchmarks/spec_bench.py examples/questions.jsonl --limit 2 --output build/spec_bench.json

``--compare-heads`` asks how many tokens a step gives instead: with plain heads and with sequential ones, without and
with lookup, by tree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from compare_heads import as_json, compare, print_comparison
from dialogues import Answers, Batch, batches, contender, engine_of, tokens_per_step
from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.demo.contenders import CONTENDERS, NATIVE_CHAIN, PLAIN, TITLES, fastest_dtype, speculative_configs
from vllm_medusa.demo.engine import Engine
from vllm_medusa.demo.places import DIRECTORY, HEADS, MODEL, native_heads_of, require_shipped
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.questions import Question, read_questions
from vllm_medusa.demo.report import machine
from vllm_medusa.demo.run import require_model
from vllm_medusa.files import write_json
from vllm_medusa.progress import track
from vllm_medusa.versions import installed_versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


Results = dict[str, list[tuple[str, Answers]]]
"""By contender, in the same order: each batch's category and its answers."""


@app.command()
def spec_bench(
    file: Annotated[Path, typer.Argument(help="Questions in Spec-Bench's format, a JSON object a line.")],
    target: Annotated[Path, typer.Option(help="A chat model; the default one is fetched if it is missing.")] = MODEL,
    heads: Annotated[Path, typer.Option(help="Its heads.")] = HEADS,
    native_heads: Annotated[
        Path | None, typer.Option(help="Plain heads, for vLLM's own chain. Default: those beside the default heads.")
    ] = None,
    compare_heads: Annotated[
        bool, typer.Option(help="Compare the plain heads with the others by tokens per step.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each category; default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Questions at the same time; may repeat.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="The most tokens of an answer.")] = 128,
    contenders: Annotated[str, typer.Option(help="Some of the contenders; plain must be the first.")] = ",".join(
        CONTENDERS
    ),
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 if the CPU has it, else float32.")] = None,
    max_model_len: Annotated[int, typer.Option(help="Tokens of a conversation.")] = 4096,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all figures.")] = None,
) -> None:
    """Answer the questions with each contender and compare."""
    with one_line_errors():
        names = contenders.split(",")
        if names[0] != PLAIN or not set(names) <= {*CONTENDERS} or len(set(names)) < len(names):
            raise ValueError(
                f"--contenders: {contenders} must begin with {PLAIN}, then have some of {[*CONTENDERS[1:]]}"
            )
        questions = read_questions(file, limit)
        sizes = batch or [1]
        require_shipped(heads, "--heads")
        require_model(target, "--target")
        share_environment()
        plain = engine_of(target, dtype or fastest_dtype(), max_model_len, max(sizes))
        native = native_heads_of(heads, native_heads)
        configs = speculative_configs(names, target, heads, native, DIRECTORY)
        details = {
            "machine": machine(),
            "versions": installed_versions(),
            "command": " ".join(sys.argv),
            "questions": len(questions),
        }
        console = Console()
        if compare_heads:
            kinds = {"plain": native, "sequential": heads}
            found = compare(kinds, configs[NATIVE_CHAIN], plain, list(batches(questions, sizes[0], tokens)))
            print_comparison(found, console)
            write(output, {**details, **as_json(found)}, console)
            return
        engines = {name: replace(plain, speculative_config=config) for name, config in configs.items()}
        by_batch = {str(size): summarise(race) for size, race in races(engines, questions, sizes, tokens)}
        for size, summary in by_batch.items():
            print_table(summary, size, console)
        write(output, {**details, "contenders": by_batch[str(sizes[0])], "by_batch": by_batch}, console)


def write(output: Path | None, results: dict[str, Any], console: Console) -> None:
    """Write the results if a file is asked for."""
    if output is not None:
        write_json(output, results)
        console.print(f"Written: {output}")


def races(
    engines: dict[str, Engine], questions: Sequence[Question], sizes: Iterable[int], tokens: int
) -> Iterable[tuple[int, Results]]:
    """Yield the results of each batch size."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, engine in track(list(engines.items()), "Starting engines"):
            contenders[name] = stack.enter_context(contender(name, engine))
            contenders[name].answer()
        for each in contenders.values():
            each.ask(Batch((questions[0],), 16))  # The first step of a kind takes longer.
        for size in sizes:
            results: Results = {name: [] for name in contenders}
            for batch in track(list(batches(questions, size, tokens)), f"{size} at once, batches"):
                for name, each in contenders.items():
                    results[name].append((batch.questions[0].category, each.ask(batch)))
            yield size, results


def summarise(results: Results) -> dict[str, dict[str, Any]]:
    """Compute each contender's figures over all batches and for each category.

    ``speedup`` is the ratio of tokens per second to plain decoding's; ``identical_texts`` the share of questions to
    which all answers are plain decoding's, token for token.
    """
    plain = results[PLAIN]
    categories = sorted({category for category, _ in plain})

    def figures(name: str, category: str | None) -> dict[str, float]:
        chosen = [index for index, (each, _) in enumerate(plain) if category in (None, each)]
        own, reference = ([run[index][1] for index in chosen] for run in (results[name], plain))
        pairs = [pair for a, b in zip(own, reference, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)]
        return {
            "tokens_per_step": tokens_per_step(own),
            "tokens_per_second": tokens_per_second(own),
            "speedup": tokens_per_second(own) / tokens_per_second(reference),
            "identical_texts": sum(a == b for a, b in pairs) / len(pairs),
        }

    return {
        name: {
            **figures(name, None),
            "by_category": {category: figures(name, category) for category in categories},
        }
        for name in results
    }


def tokens_per_second(answers: Sequence[Answers]) -> float:
    """Return emitted tokens by time, prompts included."""
    emitted = sum(len(turn) for each in answers for turns in each.tokens for turn in turns)
    return emitted / sum(each.seconds for each in answers)


def print_table(summary: dict[str, dict[str, Any]], size: str, console: Console) -> None:
    """Print tokens per step and speedup by category, and the share of identical texts."""
    table = Table(title=f"{size} at once, greedy: tokens per step, speed against plain decoding")
    table.add_column("")
    for name in summary:
        table.add_column(TITLES[name], justify="right")
    for category in summary[PLAIN]["by_category"]:
        table.add_row(category, *(_cell(each["by_category"][category]) for each in summary.values()))
    table.add_section()
    table.add_row("all", *map(_cell, summary.values()))
    table.add_row("same texts", *(f"{each['identical_texts']:.0%}" for each in summary.values()))
    console.print(table)


def _cell(figures: dict[str, Any]) -> str:
    return f"{figures['tokens_per_step']:.2f}, {figures['speedup']:.2f}x"


if __name__ == "__main__":
    app()
