# SPDX-License-Identifier: Apache-2.0
"""How fast an engine is under load, 1 to 64 requests at once: plain, vLLM's own chain, fixed trees, a budget.

All decode the same questions greedily, in a process each, and take turns, a round of one load each. What counts are
the steps in which all requests decode. Fixed trees verify all of their nodes whatever it costs; the budget's tree is
as large as the largest of them.

    python benchmarks/load.py --output build/load
    python benchmarks/load.py --concurrency 1 --concurrency 16 --contender plain --contender auto --dtype float32
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.demo.contenders import NATIVE_CHAIN, PLAIN, fastest_dtype, plugins, speculative_configs
from vllm_medusa.demo.engine import Engine, counters
from vllm_medusa.demo.places import HEADS, MODEL, QUESTIONS, native_heads_of
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.questions import read_questions
from vllm_medusa.demo.report import machine
from vllm_medusa.demo.run import encode_question
from vllm_medusa.files import write_json
from vllm_medusa.progress import track
from vllm_medusa.versions import installed_versions

AUTO = "auto"
FIXED = {"tree of 4": 4, "tree of 6": 6, "tree of 16": 16, "tree of 63": 63}
CONTENDERS = (PLAIN, NATIVE_CHAIN, *FIXED, AUTO)
RACING = (PLAIN, NATIVE_CHAIN, "tree of 4", "tree of 16", "tree of 63", AUTO)
KV_CACHE_BYTES = 1 << 30
FIRST_STEPS = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Load:
    """Requests at once: their prompts, and how many tokens each emits."""

    prompts: list[list[int]]
    tokens: int


@dataclass(frozen=True)
class Round:
    """What a contender did in the steps in which all requests decoded.

    Attributes:
        tokens: that were emitted.
        seconds: that the steps took.
        steps: how many there were.
        drafted: tokens that were verified, by vLLM's counter.
        times_per_token: each request's seconds by its tokens.

    """

    tokens: int
    seconds: float
    steps: int
    drafted: int
    times_per_token: list[float]


@dataclass(frozen=True)
class Result:
    """A contender under a load, over all rounds; ratios are taken round by round, and of these the median.

    Attributes:
        tokens_per_second: of all requests together.
        speedup: against plain decoding; None without it.
        time_per_token_p50: milliseconds, over requests.
        time_per_token_p95: the same.
        rows_per_step: the target's rows.

    """

    tokens_per_second: float
    speedup: float | None
    time_per_token_p50: float
    time_per_token_p95: float
    rows_per_step: float


@app.command()
def load(
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once; may repeat.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help=f"May repeat: {', '.join(CONTENDERS)}.")] = None,
    target: Annotated[Path, typer.Option(help="The target's directory.")] = MODEL,
    heads: Annotated[Path, typer.Option(help="Its heads' directory.")] = HEADS,
    questions: Annotated[Path, typer.Option(help="Questions in Spec-Bench's format.")] = QUESTIONS,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 48,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 if the CPU has it, else float32.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = machine()["cores"],
    processor_time: Annotated[bool, typer.Option(help="For busy machines, with one thread.")] = False,
    output: Annotated[Path, typer.Option(help="A directory for load.json, load.png and logs.")] = Path("build/load"),
) -> None:
    """Race the contenders under each load."""
    with one_line_errors():
        loads, names = concurrency or [1, 2, 4, 8, 16, 32, 64], contender or list(RACING)
        for name in names:
            if name not in CONTENDERS:
                raise ValueError(f"--contender: {name!r} is none of {list(CONTENDERS)}")
        dtype = dtype or fastest_dtype()
        prompts = _prompts(target, questions)
        share_environment()
        configs = _configs(names, target, heads, output)
        ran: dict[int, dict[str, list[Round]]] = {most: {name: [] for name in names} for most in loads}
        with ExitStack() as stack:
            engines: dict[str, Contender] = {}
            for name in track(names, "Starting"):
                engine = Engine(str(target), dtype, configs[name], 1024, True, max(loads), KV_CACHE_BYTES)
                arguments = (engine, threads, processor_time)
                environment = plugins(name)
                log = output / f"{name.replace(' ', '-')}.log"
                engines[name] = stack.enter_context(Contender(name, serve, arguments, environment, log))
                engines[name].answer()
            for most in track(loads, "Loads"):
                for number in range(-1, rounds):  # The first round warms the prefix cache up, and the budget.
                    asked = Load(list(islice(cycle(prompts), max(number, 0), max(number, 0) + most)), tokens)
                    for name in names:
                        done: Round = engines[name].ask(asked)
                        if number >= 0:
                            ran[most][name].append(done)
        results = {most: summarise(own) for most, own in ran.items()}
        clock = "processor time" if processor_time else "wall time"
        print_tables(results, f"{clock}, {dtype}, {threads} threads, {rounds} rounds of {tokens} tokens")
        speed = {
            str(most): {name: each.tokens_per_second for name, each in own.items()} for most, own in results.items()
        }
        details = {most: {name: asdict(each) for name, each in own.items()} for most, own in results.items()}
        about = {
            "machine": machine(),
            "versions": installed_versions(),
            "command": " ".join(sys.argv),
            "dtype": dtype,
            "threads": threads,
        }
        write_json(output / "load.json", {"concurrency": speed, "details": details, **about})
        plot(results, output / "load.png")


def _prompts(target: Path, questions: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return [encode_question(tokenizer, question) for question in read_questions(questions)]


def _configs(names: Sequence[str], target: Path, heads: Path, directory: Path) -> dict[str, dict[str, Any] | None]:
    stock = [name for name in names if name in (PLAIN, NATIVE_CHAIN)]
    configs = speculative_configs(stock, target, heads, native_heads_of(heads, None), directory)
    for name in names:
        if name not in stock:
            options: dict[str, Any] = {"num_speculative_tokens": max(FIXED.values())}
            if name in FIXED:
                options = {"num_speculative_tokens": FIXED[name], "medusa_budget": "off"}
            configs[name] = {"method": "medusa", "model": str(heads), "medusa_tree": "dynamic", **options}
    return configs


def serve(connection: Connection, engine: Engine, threads: int, processor_time: bool) -> None:
    """Be a contender: send ``None`` after the start, then a ``Round`` for each ``Load``."""
    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm = engine.open()
    connection.send(None)
    while True:
        clock = time.process_time if processor_time else time.perf_counter
        connection.send(decode(llm, connection.recv(), clock))


def decode(llm: Any, load: Load, clock: Callable[[], float]) -> Round:
    """Decode under a load."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=load.tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    emitted: dict[str, int] = {}
    for prompt in load.prompts:
        name = str(next(llm.request_counter))
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        emitted[name] = 0
    seconds, steps, before, drafted = 0.0, 0, counters(llm), 0
    while llm.llm_engine.has_unfinished_requests():
        start = clock()
        outputs = llm.llm_engine.step()
        taken = clock() - start
        if len(outputs) < len(emitted) or any(output.finished for output in outputs):
            if not steps:
                continue  # Some are still at their prompts.
            break
        steps += 1
        if steps == FIRST_STEPS:
            before = counters(llm)
        if steps > FIRST_STEPS:
            seconds += taken
            for output in outputs:
                emitted[output.request_id] += len(output.outputs[0].token_ids)
            drafted = counters(llm)["drafted"] - before["drafted"]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    times = [seconds / count for count in emitted.values() if count]
    return Round(sum(emitted.values()), seconds, steps - FIRST_STEPS, drafted, times)


def summarise(rounds: dict[str, list[Round]]) -> dict[str, Result]:
    """Reduce the rounds of all contenders under one load."""
    found = {}
    for name, own in rounds.items():
        speeds = [each.tokens / each.seconds for each in own]
        plain = [each.tokens / each.seconds for each in rounds.get(PLAIN, [])]
        times = sorted(1e3 * time for each in own for time in each.times_per_token)
        found[name] = Result(
            tokens_per_second=statistics.median(speeds),
            speedup=statistics.median(a / b for a, b in zip(speeds, plain, strict=True)) if plain else None,
            time_per_token_p50=times[len(times) // 2],
            time_per_token_p95=times[len(times) * 95 // 100],
            rows_per_step=sum(len(each.times_per_token) * each.steps + each.drafted for each in own)
            / sum(each.steps for each in own),
        )
    return found


def print_tables(results: dict[int, dict[str, Result]], title: str) -> None:
    """Print a line for each load and contender."""
    table = Table(title=title)
    for column in ("requests", "contender", "tokens/s", "/plain", "ms/token p50", "p95", "rows/step"):
        table.add_column(column, justify="right")
    for most, own in results.items():
        for name, each in own.items():
            table.add_row(
                str(most),
                name,
                f"{each.tokens_per_second:.1f}",
                "" if each.speedup is None else f"{each.speedup:.2f}",
                f"{each.time_per_token_p50:.1f}",
                f"{each.time_per_token_p95:.1f}",
                f"{each.rows_per_step:.1f}",
            )
    Console().print(table)


def plot(results: dict[int, dict[str, Result]], path: Path) -> None:
    """Draw tokens per second over the number of requests, as a multiple of plain decoding's where that took part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    loads = list(results)
    for name in results[loads[0]]:
        each = [results[most][name] for most in loads]
        axes.plot(loads, [one.speedup or one.tokens_per_second for one in each], "o-", label=name)
    has_plain = PLAIN in results[loads[0]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(most) for most in loads])
    axes.set_xlabel("requests at once")
    axes.set_ylabel("tokens per second" + (", plain decoding = 1" if has_plain else ""))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app()
