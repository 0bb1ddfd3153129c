# SPDX-License-Identifier: Apache-2.0
"""Speculation on questions in Spec-Bench's format: tokens per step and speed by category, against plain decoding.

A file has a question a line: ``{"question_id", "category", "turns": [...]}``. Each engine answers the turns one after
another through the model's chat template, greedily, with its own answers in between. Engines are processes of their
own and take turns, batch by batch; a batch has questions of one category. Without further options model, heads and
trees are the demo's. ``native_chain`` is vLLM's own Medusa without the plugin, and needs vLLM 0.32; it gets heads over
the whole vocabulary, which are derived once.

    python benchmarks/spec_bench.py examples/questions.jsonl --limit 2 --output build/spec_bench.json
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.demo.contenders import CONTENDERS, PLAIN, TITLES, fastest_dtype, plugins, speculative_configs
from vllm_medusa.demo.engine import counters
from vllm_medusa.demo.places import DIRECTORY, HEADS, MODEL, require_shipped
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.questions import Question, read_questions
from vllm_medusa.demo.report import machine
from vllm_medusa.demo.run import require_model
from vllm_medusa.files import write_json
from vllm_medusa.progress import track
from vllm_medusa.versions import installed_versions

KV_CACHE_BYTES = 1 << 30

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Engine:
    """Options of ``vllm.LLM``."""

    target: str
    dtype: str
    speculative_config: dict[str, Any] | None
    max_model_len: int
    max_num_seqs: int
    threads: int


@dataclass(frozen=True)
class Batch:
    """Questions of one category that are answered at the same time, and the most tokens of an answer."""

    questions: tuple[Question, ...]
    tokens: int


@dataclass(frozen=True)
class Answers:
    """What an engine made of a batch.

    Attributes:
        tokens: the token ids of each answer, ``[questions][turns]``.
        seconds: from the questions to the last answer, prompts included.
        drafts: number of drafts, by vLLM's counter.
        accepted: number of accepted tokens, by vLLM's counter.

    """

    tokens: list[list[list[int]]]
    seconds: float
    drafts: int
    accepted: int


Results = dict[str, list[tuple[str, Answers]]]
"""By contender, in the same order: each batch's category and its answers."""


@app.command()
def spec_bench(
    file: Annotated[Path, typer.Argument(help="Questions in Spec-Bench's format, a JSON object a line.")],
    target: Annotated[Path, typer.Option(help="A chat model; the default one is fetched if it is missing.")] = MODEL,
    heads: Annotated[Path, typer.Option(help="Its heads.")] = HEADS,
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
        threads = machine()["cores"]  # Only one engine works at a time.
        engines = {
            name: Engine(str(target), dtype or fastest_dtype(), config, max_model_len, max(sizes), threads)
            for name, config in speculative_configs(names, target, heads, DIRECTORY).items()
        }
        by_batch = {str(size): summarise(race) for size, race in races(engines, questions, sizes, tokens)}
        console = Console()
        for size, summary in by_batch.items():
            print_table(summary, size, console)
        if output is not None:
            details = {"machine": machine(), "versions": installed_versions(), "command": " ".join(sys.argv)}
            first = by_batch[str(sizes[0])]
            write_json(output, {**details, "questions": len(questions), "contenders": first, "by_batch": by_batch})
            console.print(f"Written: {output}")


def races(
    engines: dict[str, Engine], questions: Sequence[Question], sizes: Iterable[int], tokens: int
) -> Iterable[tuple[int, Results]]:
    """Yield the results of each batch size."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, engine in track(list(engines.items()), "Starting engines"):
            log = Path("build/spec_bench") / f"{name}.log"
            contenders[name] = stack.enter_context(Contender(name, serve, (engine,), plugins(name), log))
            contenders[name].answer()
        for contender in contenders.values():
            contender.ask(Batch((questions[0],), 16))  # The first step of a kind takes longer.
        for size in sizes:
            results: Results = {name: [] for name in contenders}
            for batch in track(list(batches(questions, size, tokens)), f"{size} at once, batches"):
                for name, contender in contenders.items():
                    results[name].append((batch.questions[0].category, contender.ask(batch)))
            yield size, results


def batches(questions: Sequence[Question], size: int, tokens: int) -> Iterable[Batch]:
    """Cut the questions, which are sorted by category, into batches of one category each."""
    for _, group in groupby(questions, attrgetter("category")):
        each = tuple(group)
        for start in range(0, len(each), size):
            yield Batch(each[start : start + size], tokens)


def serve(connection: Connection, engine: Engine) -> None:
    """Be a contender: send ``None`` after the start, then an ``Answers`` for each ``Batch``."""
    from vllm import LLM, SamplingParams

    set_num_threads(engine.threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    gc.freeze()
    llm = LLM(
        model=engine.target,
        dtype=engine.dtype,
        speculative_config=engine.speculative_config,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        disable_log_stats=False,
        seed=0,
    )
    connection.send(None)
    while True:
        batch: Batch = connection.recv()
        connection.send(answer(llm, batch, SamplingParams(temperature=0, max_tokens=batch.tokens)))


def answer(llm: Any, batch: Batch, params: Any) -> Answers:
    """Answer a batch's questions, turn by turn; questions with fewer turns leave early."""
    before, start = counters(llm), time.perf_counter()
    dialogues: list[list[dict[str, str]]] = [[] for _ in batch.questions]
    tokens: list[list[list[int]]] = [[] for _ in batch.questions]
    for turn in range(max(len(question.turns) for question in batch.questions)):
        asked = [index for index, question in enumerate(batch.questions) if turn < len(question.turns)]
        for index in asked:
            dialogues[index].append({"role": "user", "content": batch.questions[index].turns[turn]})
        outputs = llm.chat([dialogues[index] for index in asked], params, use_tqdm=False)
        for index, output in zip(asked, outputs, strict=True):
            dialogues[index].append({"role": "assistant", "content": output.outputs[0].text})
            tokens[index].append(list(output.outputs[0].token_ids))
    seconds = time.perf_counter() - start
    added = {name: value - before[name] for name, value in counters(llm).items()}
    return Answers(tokens, seconds, added["drafts"], added["accepted"])


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
        drafts, accepted = (sum(map(attrgetter(field), own)) for field in ("drafts", "accepted"))
        pairs = [pair for a, b in zip(own, reference, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)]
        return {
            "tokens_per_step": 1 + accepted / drafts if drafts else 1.0,
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
