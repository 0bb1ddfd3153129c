# SPDX-License-Identifier: Apache-2.0
"""How fast an engine is under load, 1 to 64 requests at once: plain, vLLM's own chain, fixed trees, a budget.

All decode the same questions greedily, in a process each, and take turns of half a second. What counts are the steps
in which all requests decode. Fixed trees verify all of their nodes whatever it costs; the budget's tree is as large as
the largest of them.

    python benchmarks/load.py --output build/load
    python benchmarks/load.py --concurrency 1 --concurrency 16 --contender plain --contender auto --dtype float32

``--servers`` asks the same of real servers instead, by vLLM's own ``vllm bench serve``: what counts then is the time of
whole requests, as clients see it.

    python benchmarks/load.py --servers --output build/load_servers
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from signal import SIGTERM, signal
from typing import Annotated, Any

import typer

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from load_report import Result, report
from load_servers import Server, Traffic, result_of
from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.demo.contenders import NATIVE_CHAIN, PLAIN, fastest_dtype, plugins, speculative_configs
from vllm_medusa.demo.engine import Engine, counters
from vllm_medusa.demo.places import HEADS, MODEL, QUESTIONS, native_heads_of
from vllm_medusa.demo.process import Contender, answer_in_turns, share_environment, take_turns
from vllm_medusa.demo.questions import read_questions
from vllm_medusa.demo.report import machine
from vllm_medusa.demo.run import encode_question
from vllm_medusa.progress import track

AUTO = "auto"
FIXED = {"tree_4": 4, "tree_6": 6, "tree_16": 16, "tree_63": 63}
CONTENDERS = (PLAIN, NATIVE_CHAIN, *FIXED, AUTO)
RACING = (PLAIN, NATIVE_CHAIN, "tree_4", "tree_16", "tree_63", AUTO)
LOADS, SERVERS_LOADS = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 64)
KV_CACHE_BYTES = 1 << 30
FIRST_STEPS = 2
MIN_TOKENS = 16
LONGEST = 10

FEW = 4
"""With more requests at once a round takes long, so each has half the tokens."""

ROUNDS = 3
"""At least so many, since a single one can be far off; a contender whose round takes longer than ``LONG`` has one."""

LONG = 10.0
"""Seconds."""

TURN = 0.5
"""Seconds of a turn. Contenders take turns in a round too: a machine may be a quarter slower a few seconds later."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Load:
    """Requests at once: their prompts, and how many tokens each emits on average in the steps that count."""

    prompts: list[list[int]]
    tokens: int


@dataclass(frozen=True)
class Work:
    """What is raced: prompts, and tokens and rounds by the number of requests at once."""

    prompts: list[list[int]]
    tokens: dict[int, int]
    rounds: dict[int, int]

    def load(self, requests: int, number: int) -> Load:
        """Return a round's load: the next prompts, from the first one on again where they run out."""
        start = number * requests
        return Load(list(islice(cycle(self.prompts), start, start + requests)), self.tokens[requests])


@dataclass(frozen=True)
class Round:
    """What a contender did in the steps in which all requests decoded.

    Attributes:
        tokens: that were emitted.
        seconds: that the steps took.
        steps: how many there were.
        drafted: tokens that were verified, by vLLM's counter.
        times_per_token: each request's seconds by its tokens.
        finished: whether the round is over, and not only the contender's turn.

    """

    tokens: int
    seconds: float
    steps: int
    drafted: int
    times_per_token: list[float]
    finished: bool = True


@app.command()
def load(
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once; may repeat.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help=f"May repeat: {', '.join(CONTENDERS)}.")] = None,
    target: Annotated[Path, typer.Option(help="The target's directory.")] = MODEL,
    heads: Annotated[Path, typer.Option(help="Its heads' directory.")] = HEADS,
    questions: Annotated[Path, typer.Option(help="Questions in Spec-Bench's format.")] = QUESTIONS,
    requests: Annotated[int, typer.Option(min=1, help=f"Requests under each load, and at least {ROUNDS} rounds.")] = 6,
    tokens: Annotated[
        int, typer.Option(min=MIN_TOKENS, help=f"Tokens of a request; half of it with more than {FEW} at once.")
    ] = 32,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 if the CPU has it, else float32.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = machine()["cores"],
    servers: Annotated[bool, typer.Option(help="Ask real servers, by vllm bench serve.")] = False,
    processor_time: Annotated[bool, typer.Option(help="For busy machines, with one thread.")] = False,
    output: Annotated[Path, typer.Option(help="A directory for load.json, load.png and logs.")] = Path("build/load"),
) -> None:
    """Race the contenders under each load."""
    with one_line_errors():
        loads, names = concurrency or list(SERVERS_LOADS if servers else LOADS), contender or list(RACING)
        for name in names:
            if name not in CONTENDERS:
                raise ValueError(f"--contender: {name!r} is none of {list(CONTENDERS)}")
        if servers and processor_time:
            raise ValueError("--processor-time: clients of --servers have none of the servers; leave it out")
        dtype = dtype or fastest_dtype()
        share_environment()
        engines = {
            name: Engine(str(target), dtype, config, 1024, True, max(loads), KV_CACHE_BYTES)
            for name, config in _configs(names, target, heads, output).items()
        }
        asked = {most: tokens if most <= FEW else max(tokens // 2, MIN_TOKENS) for most in loads}
        rounds = {most: max(ceil(requests / most), 1 if servers else ROUNDS) for most in loads}
        about = {"dtype": dtype, "threads": threads, "tokens": asked, "servers": servers}
        words = f"{dtype}, {threads} threads, {tokens} tokens at most"
        if servers:
            traffic = [Traffic(target, questions, most, most * rounds[most], asked[most]) for most in loads]
            results = race_servers(engines, traffic, threads, output)
            report(results, f"vllm bench serve: {words}", output, about)
        else:
            work = Work(_prompts(target, questions), asked, rounds)
            results = race(engines, work, threads, processor_time, output)
            clock = "processor time" if processor_time else "wall time"
            report(results, f"{clock}, {words}", output, about)


def race(
    engines: dict[str, Engine], work: Work, threads: int, processor_time: bool, logs: Path
) -> dict[int, dict[str, Result]]:
    """Race engines in processes of their own, round by round, and turn by turn in a round."""
    results = {}
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, engine in track(list(engines.items()), "Starting"):
            arguments = (engine, threads, processor_time)
            contenders[name] = stack.enter_context(
                Contender(name, serve, arguments, plugins(name), logs / f"{name}.log")
            )
            contenders[name].answer()
        for most in track(list(work.tokens), "Loads"):
            if AUTO in contenders:  # A round beforehand, in which the budget sees this load.
                take_turns([contenders[AUTO]], work.load(most, 0))
            ran: dict[str, list[Round]] = {name: [] for name in contenders}
            for number in range(work.rounds[most]):
                racing = [each for name, each in contenders.items() if not ran[name] or ran[name][0].seconds < LONG]
                found: dict[str, Round] = take_turns(racing, work.load(most, number))
                for name, each in found.items():
                    ran[name].append(each)
            results[most] = summarise(ran)
    return results


def race_servers(
    engines: dict[str, Engine], traffic: Sequence[Traffic], threads: int, logs: Path
) -> dict[int, dict[str, Result]]:
    """Ask servers, which all run, one after the other under each load."""
    results: dict[int, dict[str, Result]] = {}
    signal(SIGTERM, lambda *_: sys.exit("ended by a signal"))  # So that the servers are stopped then too.
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(Server(name, engine, threads, plugins(name), logs / f"{name}.log"))
            for name, engine in engines.items()
        }
        for server in track(list(servers.values()), "Starting"):
            server.wait_until_ready()
        for each in track(traffic, "Loads"):
            # Beforehand the budget sees this load.
            found = {
                name: server.measure(each, warm_ups=each.concurrency if name == AUTO else 1)
                for name, server in servers.items()
            }
            plain = found.get(PLAIN)
            results[each.concurrency] = {name: result_of(own, plain, each.concurrency) for name, own in found.items()}
    return results


def _prompts(target: Path, questions: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [encode_question(tokenizer, question) for question in read_questions(questions)]
    Random(0).shuffle(prompts)  # They are sorted by category.
    return prompts


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
    clock = time.process_time if processor_time else time.perf_counter
    while True:
        answer_in_turns(connection, decode(llm, connection.recv(), clock))


def decode(llm: Any, load: Load, clock: Callable[[], float]) -> Iterator[Round]:
    """Decode under a load; yield how far the round is after each turn, and last the whole."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=LONGEST * load.tokens,  # None ends before all have as many on average.
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    emitted: dict[str, int] = {}
    for prompt in load.prompts:
        name = str(next(llm.request_counter))
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        emitted[name] = 0
    seconds, in_turn, steps, before, drafted = 0.0, 0.0, 0, counters(llm), 0

    def so_far(*, finished: bool) -> Round:
        times = [seconds / count for count in emitted.values() if count]
        return Round(sum(emitted.values()), seconds, steps - FIRST_STEPS, drafted, times, finished)

    while sum(emitted.values()) < load.tokens * len(emitted):
        if in_turn >= TURN:
            in_turn = 0.0
            yield so_far(finished=False)
        start = clock()
        outputs = llm.llm_engine.step()
        taken = clock() - start
        in_turn += taken
        if len(outputs) < len(emitted):
            continue  # Some are still at their prompts.
        steps += 1
        if steps == FIRST_STEPS:
            before = counters(llm)
        if steps > FIRST_STEPS:
            seconds += taken
            for output in outputs:
                emitted[output.request_id] += len(output.outputs[0].token_ids)
            drafted = counters(llm)["drafted"] - before["drafted"]
    llm.llm_engine.abort_request(list(emitted))
    llm.llm_engine.step()
    yield so_far(finished=True)


def summarise(rounds: dict[str, list[Round]]) -> dict[str, Result]:
    """Reduce the rounds of all contenders under one load.

    A speed is all tokens by all seconds: rounds have other prompts, and are short. What disturbs the machine disturbs
    all contenders, since they take turns. Speedups are taken over the rounds that both had.
    """
    found = {}
    for name, own in rounds.items():
        plain = rounds.get(PLAIN, [])
        both = min(len(own), len(plain))
        times = sorted(1e3 * time for each in own for time in each.times_per_token)
        found[name] = Result(
            tokens_per_second=_speed(own),
            speedup=_speed(own[:both]) / _speed(plain[:both]) if both else None,
            time_per_token_p50=times[len(times) // 2],
            time_per_token_p95=times[len(times) * 95 // 100],
            rows_per_step=sum(len(each.times_per_token) * each.steps + each.drafted for each in own)
            / sum(each.steps for each in own),
        )
    return found


def _speed(rounds: Sequence[Round]) -> float:
    return sum(each.tokens for each in rounds) / sum(each.seconds for each in rounds)


if __name__ == "__main__":
    app()
