# SPDX-License-Identifier: Apache-2.0
"""Whether an engine's memory grows: stock vLLM and engines with trees serve the same mixed requests, side by side.

Each engine is a process of its own, without a network; they take turns, round by round. After each round a process
reports its resident memory, and how much of it is left once freed memory is given back to the system. The KV cache is
small, so that it is soon in use as a whole. Any target with a tokenizer and its heads will do, such as the demo's:

    python benchmarks/soak.py --target TARGET --heads HEADS --requests 5000 --output build/soak
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.files import write_json
from vllm_medusa.versions import installed_versions

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

STOCK = "stock vLLM"
ENGINES: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "static tree": {"medusa_tree": "sparse", "medusa_budget": "off"},
    "dynamic tree": {"medusa_tree": "dynamic", "medusa_budget": "off"},
}
"""Each engine's part of ``--speculative-config``. A budget would verify hardly a node, since prompts are random."""

KV_CACHE_BYTES = 1 << 25
MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 16
ABORTED_SHARE = 0.05
MIB = 1 << 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Round:
    """Requests to serve: their number, and the seed from which they are drawn."""

    requests: int
    seed: int


@dataclass(frozen=True)
class Memory:
    """A process after a round.

    Attributes:
        requests: requests served since the start.
        resident: MiB of resident memory.
        in_use: MiB of it after what was freed has gone back to the system.
        objects: Python objects that the garbage collector tracks.

    """

    requests: int
    resident: float
    in_use: float
    objects: int


@app.command()
def soak(
    target: Annotated[Path, typer.Option(help="The target's directory, with a tokenizer.")],
    heads: Annotated[Path, typer.Option(help="Its heads' directory.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests for each engine.")] = 5000,
    per_round: Annotated[int, typer.Option(min=1, help="Requests between two measurements.")] = 100,
    minutes: Annotated[float, typer.Option(min=0, help="No round starts later than this.")] = 60.0,
    output: Annotated[Path, typer.Option(help="Where memory.json, memory.png and logs go.")] = Path("build/soak"),
) -> None:
    """Serve the requests, and print and draw each engine's memory."""
    share_environment()
    curves: dict[str, list[Memory]] = {name: [] for name in ENGINES}
    end = time.monotonic() + 60 * minutes
    rounds = [Round(min(per_round, requests - start), start) for start in range(0, requests, per_round)]
    with ExitStack() as stack:
        contenders = {name: stack.enter_context(start(name, target, heads, output)) for name in ENGINES}
        for name, contender in contenders.items():
            curves[name].append(contender.answer())
        for asked in track(rounds, "serving", console=Console(stderr=True)):
            if time.monotonic() > end:
                break
            for name, contender in contenders.items():
                curves[name].append(contender.ask(asked))
            write_results(curves, output / "memory.json")
    print_table(curves)
    draw(curves, output / "memory.png")


def start(name: str, target: Path, heads: Path, output: Path) -> Contender:
    """Start an engine's process."""
    options = ENGINES[name]
    speculative = None if options is None else {"method": "medusa", "model": str(heads), **options}
    plugins = {"VLLM_PLUGINS": "" if options is None else "medusa"}
    return Contender(name, serve, (str(target), speculative), plugins, output / f"{name.replace(' ', '-')}.log")


def serve(connection: Connection, target: str, speculative: dict[str, Any] | None) -> None:
    """Be an engine: send a ``Memory`` after the start, and one for each ``Round``."""
    from vllm import LLM

    set_num_threads(1)
    llm = LLM(
        model=target,
        dtype="float32",
        speculative_config=speculative,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        disable_log_stats=False,
        seed=0,
    )
    served = 0
    connection.send(memory(served))
    while True:
        asked: Round = connection.recv()
        serve_round(llm, asked)
        served += asked.requests
        connection.send(memory(served))


def serve_round(llm: LLM, asked: Round) -> None:
    """Serve requests of all kinds; some clients leave early."""
    engine, draw = llm.llm_engine, random.Random(asked.seed)
    vocabulary = llm.model_config.get_vocab_size()
    leaving: set[str] = set()
    for number in range(asked.requests):
        name = f"{asked.seed}-{number}"
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randrange(4, 200))]
        engine.add_request(name, {"prompt_token_ids": prompt}, parameters(draw))
        if draw.random() < ABORTED_SHARE:
            leaving.add(name)
    while engine.has_unfinished_requests():
        for result in engine.step():
            if result.request_id in leaving and not result.finished:
                engine.abort_request([result.request_id])
                leaving.discard(result.request_id)


def parameters(draw: random.Random) -> SamplingParams:
    """Draw a request's parameters."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    kinds: Sequence[dict[str, Any]] = (
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "seed": draw.randrange(2**31)},
        {"temperature": 1.0, "top_k": 20, "n": 2},
        {"temperature": 0.0, "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 0.0, "stop": ["e", "("]},
        {"temperature": 0.0, "logit_bias": {5: 2.0}},
        {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex="[a-f]{4,40}")},
    )
    return SamplingParams(max_tokens=draw.randrange(4, 64), **draw.choice(kinds))


def memory(served: int) -> Memory:
    """Measure this process."""
    gc.collect()
    resident = resident_mib()
    ctypes.CDLL(None).malloc_trim(0)
    return Memory(served, resident, resident_mib(), len(gc.get_objects()))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def growth(curve: Sequence[Memory]) -> float:
    """MiB that are in use at the end beyond those at the middle, for each 1,000 requests between."""
    middle, last = curve[len(curve) // 2], curve[-1]
    return 1000 * (last.in_use - middle.in_use) / max(last.requests - middle.requests, 1)


def print_table(curves: dict[str, list[Memory]]) -> None:
    """Print each engine's resident memory over the requests."""
    table = Table(title="Resident memory after so many requests, in MiB; of it in use")
    table.add_column("requests", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    count = len(curves[STOCK])
    for index in sorted({round(step * (count - 1) / 10) for step in range(11)}):
        row = [curve[index] for curve in curves.values()]
        table.add_row(str(row[0].requests), *(f"{each.resident:.0f}; {each.in_use:.0f}" for each in row))
    table.add_section()
    table.add_row("per 1,000, 2nd half", *(f"{growth(curve):+.1f}" for curve in curves.values()))
    table.add_row("Python objects", *(f"{c[len(c) // 2].objects} → {c[-1].objects}" for c in curves.values()))
    Console().print(table)


def write_results(curves: dict[str, list[Memory]], path: Path) -> None:
    """Write what is measured so far."""
    details = {"machine": machine(), "versions": installed_versions(), "command": " ".join(["python", *sys.argv])}
    write_json(path, {**details, "curves": {name: [asdict(each) for each in curve] for name, curve in curves.items()}})


def draw(curves: dict[str, list[Memory]], path: Path) -> None:
    """Draw each engine's memory beyond its start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        served = [each.requests for each in curve]
        [line] = axes.plot(served, [each.resident - curve[0].resident for each in curve], label=f"{name}, resident")
        in_use = [each.in_use - curve[0].in_use for each in curve]
        axes.plot(served, in_use, "--", color=line.get_color(), label=f"{name}, in use")
    axes.set(xlabel="requests served", ylabel="MiB more than after the start", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    app()
