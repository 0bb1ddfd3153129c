# SPDX-License-Identifier: Apache-2.0
"""Typical acceptance: tokens per step against how probable the target finds the text, for several epsilon.

Each epsilon has an engine of its own, delta is its square root as in the paper, and the first engine also decodes the
same prompts exactly. The measure of the text is its mean log-probability per token in nats, by the target's own
distribution before temperature. It grows as the temperature falls, so compare points of one temperature.

    python benchmarks/typical.py PROMPTS.jsonl --target TARGET --heads HEADS --output build/typical
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.data.prompts import read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.demo.contenders import fastest_dtype
from vllm_medusa.demo.engine import Engine, acceptance_length, counters
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.files import write_json
from vllm_medusa.progress import track
from vllm_medusa.versions import installed_versions

KV_CACHE_BYTES = 1 << 29
EXACT = "exact"
TYPICAL = "typical"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Order:
    """What to decode, and how; ``chat`` puts each prompt into the model's chat template."""

    prompts: tuple[str, ...]
    chat: bool
    tokens: int
    temperature: float
    acceptance: str


@dataclass(frozen=True)
class Decoded:
    """What an engine made of an order.

    Attributes:
        tokens: emitted tokens of each prompt.
        log_probs: the mean log-probability of each prompt's emitted tokens, nats.
        steps: number of steps behind each text's first token, by vLLM's counter.
        accepted: number of accepted tokens, by vLLM's counter.

    """

    tokens: list[int]
    log_probs: list[float]
    steps: int
    accepted: int


@dataclass(frozen=True)
class Point:
    """A point of the plot.

    Attributes:
        acceptance: the rule.
        epsilon: of typical acceptance; None for the exact rule.
        temperature: of sampling.
        tokens_per_step: 1 + accepted tokens per draft.
        log_prob: the mean over prompts of their texts' mean log-probability, nats a token.
        standard_error: that of ``log_prob``, over prompts; None for a single prompt.

    """

    acceptance: str
    epsilon: float | None
    temperature: float
    tokens_per_step: float
    log_prob: float
    standard_error: float | None


@app.command()
def typical(
    file: Annotated[Path, typer.Argument(help="Prompts, a JSON object a line, as vllm-medusa distill reads them.")],
    target: Annotated[Path, typer.Option(help="The target's directory.")],
    heads: Annotated[Path, typer.Option(help="Its heads' directory.")],
    output: Annotated[Path, typer.Option(help="A directory for typical.json and typical.png.")],
    epsilon: Annotated[list[float] | None, typer.Option(min=0, max=1, help="May repeat.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(min=0.01, help="May repeat.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts.")] = 80,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at the same time.")] = 8,
    chat: Annotated[bool, typer.Option(help="Whether prompts are turns of a user.")] = True,
    tree: Annotated[str, typer.Option(help="medusa_tree.")] = "dynamic",
    nodes: Annotated[int | None, typer.Option(min=1, help="num_speculative_tokens.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 if the CPU has it, else float32.")] = None,
    max_model_len: Annotated[int, typer.Option(help="Tokens of a prompt and its text.")] = 2048,
) -> None:
    """Decode the prompts with each rule and temperature, and plot."""
    with one_line_errors():
        prompts = _prompts(file, limit)
        temperatures = temperature or [0.7, 1.0]
        share_environment()
        points: list[Point] = []
        for index, each in enumerate(track(epsilon or [0.01, 0.03, 0.09, 0.2, 0.4], "Engines")):
            speculative = {
                "method": "medusa",
                "model": str(heads),
                "medusa_tree": tree,
                "medusa_budget": "off",  # It would verify as many nodes as pay just then.
                "medusa_posterior_threshold": each,
                "medusa_posterior_alpha": math.sqrt(each),
            }
            if nodes is not None:
                speculative["num_speculative_tokens"] = nodes
            engine = Engine(
                str(target),
                dtype or fastest_dtype(),
                speculative,
                max_model_len=max_model_len,
                max_num_seqs=batch,
                enable_prefix_caching=True,
                kv_cache_memory_bytes=KV_CACHE_BYTES,
                skip_tokenizer_init=False,
            )
            orders = [
                Order(prompts, chat, tokens, warmth, rule)
                for rule in ([EXACT, TYPICAL] if index == 0 else [TYPICAL])
                for warmth in temperatures
            ]
            points += _points(engine, each, orders, output / f"epsilon-{each}.log")
        details = {"machine": machine(), "versions": installed_versions(), "command": " ".join(sys.argv)}
        write_json(output / "typical.json", {**details, "prompts": len(prompts), "points": list(map(asdict, points))})
        plot(points, output / "typical.png")
        _print_table(points)


def _prompts(file: Path, limit: int) -> tuple[str, ...]:
    found = read_prompts([file], BadLineCounter(BadLines.REFUSE))
    prompts = tuple(prompt.first_user_message.content for _, prompt in islice(found, limit))
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def _points(engine: Engine, epsilon: float, orders: Sequence[Order], log: Path) -> Iterable[Point]:
    with Contender(f"epsilon {epsilon}", serve, (engine, machine()["cores"]), {}, log) as contender:
        contender.answer()
        for order in orders:
            decoded: Decoded = contender.ask(order)
            spread = stdev(decoded.log_probs) / math.sqrt(len(decoded.log_probs)) if decoded.log_probs[1:] else None
            yield Point(
                order.acceptance,
                epsilon if order.acceptance == TYPICAL else None,
                order.temperature,
                acceptance_length(decoded.steps, decoded.accepted),
                mean(decoded.log_probs),
                spread,
            )


def serve(connection: Connection, engine: Engine, threads: int) -> None:
    """Be an engine: send ``None`` after the start, then a ``Decoded`` for each ``Order``."""
    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm = engine.open()
    connection.send(None)
    while True:
        connection.send(decode(llm, connection.recv()))


def decode(llm: Any, order: Order) -> Decoded:
    """Decode an order's prompts; prompt i has seed i, so each rule begins with the same draws."""
    from vllm import SamplingParams

    before = counters(llm)
    params = [
        SamplingParams(
            temperature=order.temperature,
            seed=seed,
            max_tokens=order.tokens,
            logprobs=0,
            extra_args={"medusa_acceptance": order.acceptance},
        )
        for seed in range(len(order.prompts))
    ]
    if order.chat:
        outputs = llm.chat([[{"role": "user", "content": text}] for text in order.prompts], params, use_tqdm=False)
    else:
        outputs = llm.generate(list(order.prompts), params, use_tqdm=False)
    texts = [output.outputs[0] for output in outputs]
    log_probs = [text.cumulative_logprob / len(text.token_ids) for text in texts]
    added = {name: value - before[name] for name, value in counters(llm).items()}
    return Decoded([len(text.token_ids) for text in texts], log_probs, added["steps"], added["accepted"])


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw tokens per step over log-probability: a line through the epsilons of each temperature, exact as a star."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, temperature in enumerate(_temperatures(points)):
        own = [point for point in points if point.temperature == temperature]
        typical_points = sorted((p for p in own if p.epsilon is not None), key=lambda p: p.epsilon or 0)
        for chosen, marker, label in (
            (typical_points, "o-", f"typical, temperature {temperature}"),
            ([p for p in own if p.epsilon is None], "*", f"exact, temperature {temperature}"),
        ):
            axes.errorbar(
                [p.log_prob for p in chosen],
                [p.tokens_per_step for p in chosen],
                xerr=[p.standard_error or 0.0 for p in chosen],
                fmt=marker,
                markersize=13 if marker == "*" else 6,
                color=f"C{index}",
                elinewidth=0.8,
                label=label,
            )
        for point in typical_points:
            axes.annotate(
                f"{point.epsilon}", (point.log_prob, point.tokens_per_step), (4, 5), textcoords="offset points"
            )
    axes.set_xlabel("mean log-probability of the text, nats a token (with standard error)")
    axes.set_ylabel("tokens per step")
    axes.set_title("Typical acceptance by epsilon, and exact acceptance")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _temperatures(points: Sequence[Point]) -> list[float]:
    return sorted({point.temperature for point in points})


def _print_table(points: Sequence[Point]) -> None:
    table = Table(title="tokens per step, mean log-probability (standard error)")
    table.add_column("acceptance")
    for temperature in _temperatures(points):
        table.add_column(f"temperature {temperature}", justify="right")
    for epsilon in dict.fromkeys(point.epsilon for point in points):
        row = {point.temperature: point for point in points if point.epsilon == epsilon}
        table.add_row(
            EXACT if epsilon is None else f"{TYPICAL}, epsilon {epsilon}",
            *(_cell(row[temperature]) for temperature in _temperatures(points)),
        )
    Console().print(table)


def _cell(point: Point) -> str:
    error = "" if point.standard_error is None else f" ({point.standard_error:.2f})"
    return f"{point.tokens_per_step:.2f}, {point.log_prob:.2f}{error}"


if __name__ == "__main__":
    app()
