# SPDX-License-Identifier: Apache-2.0
"""What a decode step costs by its number of rows: plain decoding, stock vLLM's chain, our chain and a branching tree.

All verify drafts that are random, so nothing is accepted and every step has the same rows; ours compute their heads all
the same. All run the same target, in a process each, and take turns. By default its weights are random too: a step
costs the same whatever they are.

    python benchmarks/step_cost.py --rows 1 --rows 8 --rows 16 --output build/step_cost.json
    python benchmarks/step_cost.py --target TARGET --heads HEADS --rows 1 --rows 5 --requests 1 --requests 4 \\
        --context 128 --context 1024 --dtype float32
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.demo.engine import Engine
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.versions import installed_versions

DIRECTORY = Path("build/step_cost")
HIDDEN, LAYERS, VOCAB, HEADS = 1024, 16, 4096, 4
FIRST_STEPS = 4
PLAIN, STOCK, CHAIN, TREE = "plain", "stock chain", "chain", "tree"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Kind:
    """A contender: what it drafts, and the rows that a step of one request has."""

    name: str
    rows: int


@dataclass(frozen=True)
class Load:
    """What a contender decodes in a round: requests at once, each after a prompt of ``context`` tokens."""

    requests: int
    context: int
    steps: int


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds, lower quartiles over a round's steps; 0 where a contender has no heads or commits nothing."""

    step: float
    heads: float
    commit: float


@dataclass(frozen=True)
class Models:
    """Where the models are, how they run, and the clock that times them."""

    target: str
    heads: str
    dtype: str
    threads: int
    processor_time: bool

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.processor_time else time.perf_counter

    @property
    def num_heads(self) -> int:
        return int(json.loads(Path(self.heads, "config.json").read_text())["num_heads"])


@dataclass(frozen=True)
class Result:
    """A contender under a load: medians over rounds, ratios and shares taken round by round; None if not to be had."""

    requests: int
    context: int
    rows: int
    contender: str
    milliseconds: float
    ratio_to_plain: float | None
    ratio_to_stock: float | None
    ratio_to_chain: float | None
    heads_share: float | None
    commit_share: float | None


class RandomDrafts:
    """A proposer for stock vLLM's ``custom_class`` method: tokens at random."""

    def __init__(self, vllm_config: Any) -> None:
        self.count = vllm_config.speculative_config.num_speculative_tokens
        self.vocab = vllm_config.model_config.get_vocab_size()

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return [[random.randrange(self.vocab) for _ in range(self.count)] for _ in sampled_token_ids]


@app.command()
def measure(
    rows: list[int] = [1, 8, 16],  # noqa: B006
    requests: list[int] = [1],  # noqa: B006
    context: list[int] = [128],  # noqa: B006
    target: str | None = None,
    heads: str | None = None,
    rounds: int = 7,
    steps: int = 40,
    dtype: str = "bfloat16",
    threads: int = len(os.sched_getaffinity(0)),
    processor_time: Annotated[bool, typer.Option(help="For busy machines, with one thread.")] = False,
    output: Path | None = None,
) -> None:
    """Measure step times, interleaved, and print them with their ratios; without a target and heads, made-up ones."""
    if (target is None) != (heads is None):
        raise typer.BadParameter("give --target and --heads, or neither")
    if target is None or heads is None:
        prepare_models()
        target, heads = str(DIRECTORY / "target"), str(DIRECTORY / "heads")
    models = Models(target, heads, dtype, threads, processor_time)
    share_environment()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # Where vLLM finds RandomDrafts.
    loads = [Load(*each, steps) for each in product(requests, context)]
    kinds = contenders_of(rows, models.num_heads)
    times: dict[tuple[Load, Kind], list[StepTimes]] = {each: [] for each in product(loads, kinds)}
    longest = max(context) + (steps + 1) * max(rows)
    with ExitStack() as stack:
        contenders = {kind: stack.enter_context(start(kind, models, longest)) for kind in kinds}
        for contender in track(contenders.values(), "starting", console=Console(stderr=True)):
            contender.answer()
        for load, contender in product(loads, contenders.values()):
            contender.ask(load)
        for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
            for load, (kind, contender) in product(loads, contenders.items()):
                times[load, kind].append(contender.ask(load))
    results = [summarise(load, kind, times) for load, kind in times]
    report = {
        "machine": machine(),
        "versions": installed_versions(),
        "command": " ".join(["python", *sys.argv]),
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "processor_time": processor_time,
        "results": [asdict(result) for result in results],
    }
    print_table(results, report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")


def contenders_of(rows: list[int], num_heads: int) -> list[Kind]:
    """Return the contenders: for one row plain decoding; a chain of ours is as long as there are heads at most."""
    kinds = []
    for count in rows:
        names = [PLAIN] if count == 1 else [STOCK, CHAIN, TREE] if count <= num_heads + 1 else [STOCK, TREE]
        kinds += [Kind(name, count) for name in names]
    return kinds


def summarise(load: Load, kind: Kind, times: dict[tuple[Load, Kind], list[StepTimes]]) -> Result:
    """Reduce a contender's rounds under a load."""
    own = times[load, kind]

    def ratio_to(name: str) -> float | None:
        other = times.get((load, Kind(name, 1 if name == PLAIN else kind.rows)))
        if other is None:
            return None
        return statistics.median(one.step / two.step for one, two in zip(own, other, strict=True))

    def share(part: str) -> float | None:
        return statistics.median(getattr(each, part) / each.step for each in own) or None

    return Result(
        requests=load.requests,
        context=load.context,
        rows=kind.rows,
        contender=kind.name,
        milliseconds=statistics.median(each.step for each in own),
        ratio_to_plain=ratio_to(PLAIN),
        ratio_to_stock=ratio_to(STOCK),
        ratio_to_chain=ratio_to(CHAIN),
        heads_share=share("heads"),
        commit_share=share("commit"),
    )


def print_table(results: list[Result], report: dict[str, Any]) -> None:
    """Print one line per contender and load."""
    clock = "processor time" if report["processor_time"] else "wall time"
    title = f"A decode step's {clock}, {report['dtype']}, {report['threads']} threads, {report['rounds']} rounds"
    table = Table(title=title)
    columns = ("reqs", "context", "rows", "what", "ms", "/plain", "/stock", "/chain", "heads", "commit")
    for column in columns:
        table.add_column(column, justify="right")
    for each in results:
        ratios = (each.ratio_to_plain, each.ratio_to_stock, each.ratio_to_chain)
        shares = (each.heads_share, each.commit_share)
        table.add_row(
            str(each.requests),
            str(each.context),
            str(each.rows),
            each.contender,
            f"{each.milliseconds:.1f}",
            *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
            *("" if share is None else f"{share:.1%}" for share in shares),
        )
    console = Console()
    console.print(f"{report['machine']}\n{report['command']}")
    console.print(table)


def start(kind: Kind, models: Models, longest: int) -> Contender:
    """Start a contender's process."""
    plugins = {"VLLM_PLUGINS": "medusa" if kind.name in (CHAIN, TREE) else ""}
    log = DIRECTORY / f"{kind.name.replace(' ', '-')}-{kind.rows}.log"
    return Contender(f"{kind.name}, {kind.rows} rows", serve, (kind, models, longest), plugins, log)


def serve(connection: Connection, kind: Kind, models: Models, longest: int) -> None:
    """Be a contender: answer each ``Load`` with its ``StepTimes``."""
    set_num_threads(models.threads)
    heads_times = time_heads(models.clock) if kind.name in (CHAIN, TREE) else []
    # Prompts are the same in every round, and only decode steps count.
    engine = Engine(models.target, models.dtype, speculation(kind, models), longest, enable_prefix_caching=True)
    llm = engine.open()
    connection.send(None)
    while True:
        load = connection.recv()
        heads_times.clear()
        steps = step_times(llm, load, models.clock)
        commits = commit_times(llm, kind.rows, models.clock) if kind.name == TREE else []
        connection.send(StepTimes(*(low(times) for times in (steps, heads_times[FIRST_STEPS:], commits))))


def low(seconds: list[float]) -> float:
    """Return the lower quartile in milliseconds, which other processes disturb less than the median; 0 of nothing."""
    return sorted(seconds)[len(seconds) // 4] * 1e3 if seconds else 0.0


def time_heads(clock: Callable[[], float]) -> list[float]:
    """Make our proposer note its times in the list returned, and let it draft at random after all."""
    import torch

    from vllm_medusa.runner.proposer import MedusaProposer
    from vllm_medusa.tree.drafts import Drafts

    propose, times = MedusaProposer.propose, []

    def timed(self: MedusaProposer, *arguments: Any) -> Drafts:
        begin = clock()
        drafts = propose(self, *arguments)
        times.append(clock() - begin)
        vocab = self.vllm_config.model_config.get_vocab_size()
        return replace(drafts, tokens=torch.randint_like(drafts.tokens, vocab))

    MedusaProposer.propose = timed
    return times


def speculation(kind: Kind, models: Models) -> dict[str, Any] | None:
    """Return a contender's ``speculative_config``."""
    if kind.name == PLAIN:
        return None
    if kind.name == STOCK:
        return {"method": "custom_class", "model": "step_cost.RandomDrafts", "num_speculative_tokens": kind.rows - 1}
    tree: Any = "chain"
    if kind.name == TREE:
        tree = branching_tree(kind.rows, models.num_heads)
    return {
        "method": "medusa",
        "model": models.heads,
        "num_speculative_tokens": kind.rows - 1,
        "medusa_tree": tree,
        "medusa_budget": "off",
    }


def branching_tree(rows: int, num_heads: int) -> list[list[int]]:
    """Return the paths of a tree of that many rows: a chain, as deep as heads and rows allow, and the root's children.

    Two rows cannot branch.
    """
    depth = max(1, min(num_heads, rows - 2))
    return [[0] * length for length in range(1, depth + 1)] + [[rank] for rank in range(1, rows - depth)]


def step_times(llm: Any, load: Load, clock: Callable[[], float]) -> list[float]:
    """Decode under a load; return the times in seconds of the steps in which all requests decode, less the first."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    vocab = engine.model_config.get_vocab_size()
    parameters = SamplingParams(temperature=0, max_tokens=load.steps, ignore_eos=True, detokenize=False)
    for index in range(load.requests):
        tokens = random.Random(index)
        prompt = {"prompt_token_ids": [tokens.randrange(vocab) for _ in range(load.context)]}
        engine.add_request(str(time.monotonic_ns()), prompt, parameters)
    times = []
    while engine.has_unfinished_requests():
        begin = clock()
        outputs = engine.step()
        if len(outputs) == load.requests:
            times.append(clock() - begin)
    return times[FIRST_STEPS:]


def commit_times(llm: Any, rows: int, clock: Callable[[], float]) -> list[float]:
    """Return times in seconds of moving an accepted branch of up to four rows, as far apart as the tree has them."""
    import torch

    from vllm_medusa.acceptance.exact import Walk
    from vllm_medusa.step.trees import derive_trees

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    tree = runner.drafter.tree
    trees = derive_trees(
        tree.topology.parents[None, 1:],
        cu_num_rows=torch.tensor([0, rows]),
        logits_indices=torch.arange(rows),
        input_ids=torch.zeros(rows, dtype=torch.long),
        positions=torch.zeros(rows, dtype=torch.long),
        max_depth=tree.depth,
        num_drafting_reqs=1,
    )
    branch = torch.tensor([sorted({row for row in (0, 2, 4, rows - 1) if row < rows})])
    accepted = Walk.along(trees, torch.zeros_like(branch), branch)
    slots = [table.slot_mapping.gpu for table in runner.input_batch.block_table.block_tables]
    times = []
    for _ in range(50):
        begin = clock()
        runner._commit(trees, accepted, slots)
        times.append(clock() - begin)
    return times


def prepare_models() -> None:
    """Write the target and the heads with random weights, once."""
    if (DIRECTORY / "heads" / "config.json").exists():
        return
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(DIRECTORY / "target")
    (DIRECTORY / "heads").mkdir(exist_ok=True)
    state = {f"blocks.{head}.layers.0.weight": torch.randn(HIDDEN, HIDDEN) for head in range(HEADS)}
    state |= {f"lm_heads.{head}.weight": torch.randn(VOCAB, HIDDEN) for head in range(HEADS)}
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, DIRECTORY / "heads/model.safetensors"
    )
    (DIRECTORY / "heads" / "config.json").write_text(
        json.dumps({"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_heads": HEADS, "num_hidden_layers": 1})
    )


if __name__ == "__main__":
    app()
