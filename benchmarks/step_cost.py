# SPDX-License-Identifier: Apache-2.0
"""What a step costs by its number of rows: tree steps of vllm_medusa against chain steps of stock vLLM.

Both verify drafts that are random, so nothing is accepted and every step has the same rows; both run the same target,
one request, in a process each, and take turns. A third contender adds the heads to ours. Weights are random: a step
costs the same whatever they are.

    python benchmarks/step_cost.py --rows 1 --rows 8 --rows 16 --output build/step_cost.json
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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
PROMPT_TOKENS, STEPS = 128, 40
STOCK, TREE, TREE_AND_HEADS = "stock", "tree", "tree + heads"
STEP, COMMIT = "step", "commit"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class RandomDrafts:
    """A proposer for stock vLLM's ``custom_class`` method: tokens at random."""

    def __init__(self, vllm_config: Any) -> None:
        self.count = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return [[random.randrange(VOCAB) for _ in range(self.count)] for _ in sampled_token_ids]


@app.command()
def measure(
    rows: list[int] = [1, 8, 16],  # noqa: B006
    rounds: int = 7,
    dtype: str = "bfloat16",
    threads: int = len(os.sched_getaffinity(0)),
    output: Path | None = None,
) -> None:
    """Measure step times, interleaved, and print them with their ratios."""
    prepare_models()
    share_environment()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # Where vLLM finds RandomDrafts.
    keys = [(kind, count) for count in rows for kind in ((STOCK,) if count == 1 else (STOCK, TREE, TREE_AND_HEADS))]
    times: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    commits: dict[int, list[float]] = {count: [] for kind, count in keys if kind == TREE}
    with ExitStack() as stack:
        contenders = {key: stack.enter_context(start(*key, dtype, threads)) for key in keys}
        for contender in track(contenders.values(), "starting", console=Console(stderr=True)):
            contender.answer()
        for contender in contenders.values():
            contender.ask(STEP)
        for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
            for (kind, count), contender in contenders.items():
                times[kind, count].append(contender.ask(STEP))
                if kind == TREE:
                    commits[count].append(contender.ask(COMMIT))
    results = [summarise(kind, count, times, commits) for kind, count in keys]
    print_table(results, rounds, dtype)
    report = {
        "machine": machine(),
        "versions": installed_versions(),
        "command": " ".join(["python", *sys.argv]),
        "dtype": dtype,
        "threads": threads,
        "results": results,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")


def summarise(
    kind: str, count: int, times: dict[tuple[str, int], list[float]], commits: dict[int, list[float]]
) -> dict[str, Any]:
    """Reduce a contender's rounds to medians; ratios are taken round by round."""
    own, stock = times[kind, count], times[STOCK, count]
    shares = [commit / step for commit, step in zip(commits[count], own, strict=True)] if kind == TREE else []
    return {
        "rows": count,
        "contender": kind,
        "milliseconds": statistics.median(own),
        "ratio_to_stock": statistics.median(one / other for one, other in zip(own, stock, strict=True)),
        "commit_share": statistics.median(shares) if shares else None,
    }


def print_table(results: list[dict[str, Any]], rounds: int, dtype: str) -> None:
    """Print one line per contender."""
    title = f"A step's time, one request after {PROMPT_TOKENS} tokens, {dtype}, median of {rounds} rounds"
    table = Table(title=title)
    for column in ("rows", "contender", "ms", "against stock", "commit's share"):
        table.add_column(column, justify="right")
    for row in results:
        share = "" if row["commit_share"] is None else f"{row['commit_share']:.2%}"
        table.add_row(
            str(row["rows"]), row["contender"], f"{row['milliseconds']:.1f}", f"{row['ratio_to_stock']:.3f}", share
        )
    Console().print(table)


def start(kind: str, rows: int, dtype: str, threads: int) -> Contender:
    """Start a contender's process."""
    plugins = {"VLLM_PLUGINS": "" if kind == STOCK else "medusa"}
    return Contender(
        f"{kind}, {rows} rows", serve, (kind, rows, dtype, threads), plugins, DIRECTORY / f"{kind}-{rows}.log"
    )


def serve(connection: Connection, kind: str, rows: int, dtype: str, threads: int) -> None:
    """Be a contender: answer ``STEP`` and ``COMMIT`` with milliseconds."""
    set_num_threads(threads)
    llm = Engine(str(DIRECTORY / "target"), dtype, speculation(kind, rows)).open()
    measures = {STEP: step_milliseconds, COMMIT: commit_milliseconds}
    connection.send(None)
    while True:
        connection.send(measures[connection.recv()](llm, rows))


def speculation(kind: str, rows: int) -> dict[str, Any] | None:
    """Return a contender's ``speculative_config``; ours draft at random too, unless their heads are measured."""
    import torch

    if rows == 1:
        return None
    if kind == STOCK:
        return {"method": "custom_class", "model": "step_cost.RandomDrafts", "num_speculative_tokens": rows - 1}
    if kind == TREE:
        from vllm_medusa.runner.proposer import MedusaProposer
        from vllm_medusa.tree.drafts import Drafts

        def draft_at_random(self: MedusaProposer, hidden: torch.Tensor, chained: torch.Tensor | None = None) -> Drafts:
            return self.tree.draft(torch.randint(VOCAB, (len(hidden), HEADS, self.tree.top_k)), chained)

        MedusaProposer.propose = draft_at_random
    return {"method": "medusa", "model": str(DIRECTORY / "heads"), "num_speculative_tokens": rows - 1}


def step_milliseconds(llm: Any, _rows: int) -> float:
    """Decode one prompt; return the median time of its decode steps."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompt = {"prompt_token_ids": [random.randrange(VOCAB) for _ in range(PROMPT_TOKENS)]}
    parameters = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    engine.add_request(str(time.monotonic_ns()), prompt, parameters)
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3


def commit_milliseconds(llm: Any, rows: int) -> float:
    """Return the median time of moving an accepted branch of up to four rows, as far apart as the tree has them."""
    import torch

    from vllm_medusa.acceptance.exact import Walk
    from vllm_medusa.step.trees import derive_trees

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    trees = derive_trees(
        runner.drafter.tree.topology.parents[None, 1:],
        cu_num_rows=torch.tensor([0, rows]),
        logits_indices=torch.arange(rows),
        input_ids=torch.zeros(rows, dtype=torch.long),
        positions=torch.zeros(rows, dtype=torch.long),
        max_depth=HEADS,
        num_drafting_reqs=1,
    )
    branch = torch.tensor([sorted({row for row in (0, 2, 4, rows - 1) if row < rows})])
    accepted = Walk.along(trees, torch.zeros_like(branch), branch)
    slots = [table.slot_mapping.gpu for table in runner.input_batch.block_table.block_tables]
    times = []
    for _ in range(50):
        start = time.perf_counter()
        runner._commit(trees, accepted, slots)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


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
