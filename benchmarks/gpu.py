# SPDX-License-Identifier: Apache-2.0
"""What trees cost on a GPU: the kernels against memory bandwidth, and an engine's step against plain decoding.

Weights, keys and values are random: time does not depend on them. Kernels run from CUDA graphs, each call on a cache of
its own, so that the L2 cache holds none of what the next one reads; a kernel's rate is what the cache holds, once, over
the time, and is compared with what a plain copy reads and writes. Engines run in a process each and take turns.

    python benchmarks/gpu.py --output build/gpu.json

``--tune`` tries other tilings of the attention kernel; ``--tiny`` runs everything at toy size on a CPU, to see it run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_medusa.attention import reference
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.report import machine
from vllm_medusa.step.trees import StepTrees, derive_trees
from vllm_medusa.tree.topology import DraftTree
from vllm_medusa.versions import installed_versions

DIRECTORY = Path("build/gpu")
STEP_RATIO_GOAL, BANDWIDTH_GOAL = 1.08, 0.6
BLOCK_SIZE, LEVELS, HEADS = 16, 6, 5
CACHE_BYTES = 1 << 29
"""Keys and values that the calls of one graph read: several times what an L2 cache holds."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Shape:
    """An attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.cache_dtype.itemsize


@dataclass(frozen=True)
class Size:
    """What is measured, and how much of it."""

    device: torch.device
    shapes: tuple[Shape, ...]
    precisions: tuple[tuple[torch.dtype, torch.dtype], ...]
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    processors: int
    cache_bytes: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    prompt: int
    steps: int
    engine: dict[str, Any]


def tiny_size() -> Size:
    """Toy sizes, in Triton's interpreter, which multiplies no bfloat16."""
    return Size(
        device=torch.device("cpu"),
        shapes=(Shape("toy", 4, 2, 32, torch.float32, torch.float32),),
        precisions=((torch.float32, torch.float32), (torch.float32, torch.float8_e4m3fn)),
        contexts=(40,),
        rows=(1, 5),
        batches=(1, 2),
        processors=2,
        cache_bytes=1,
        hidden=128,
        intermediate=256,
        layers=2,
        vocab=512,
        prompt=8,
        steps=12,
        engine={"dtype": "float32", "kv_cache_memory_bytes": 1 << 26, "enforce_eager": True},
    )


def full_size() -> Size:
    """A 7B-shaped Llama with and without grouped queries."""
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    return Size(
        device=torch.device("cuda"),
        shapes=(
            Shape("32 KV heads", 32, 32, 128, bf16, bf16),
            Shape("8 KV heads", 32, 8, 128, bf16, bf16),
            Shape("8 KV heads, fp8", 32, 8, 128, bf16, fp8),
        ),
        precisions=((torch.float32, torch.float32), (torch.float16, torch.float16), (bf16, bf16), (bf16, fp8)),
        contexts=(1024, 8192, 32768),
        rows=(1, 8, 16, 32, 64),
        batches=(1, 8, 32),
        processors=torch.cuda.get_device_properties("cuda").multi_processor_count,
        cache_bytes=CACHE_BYTES,
        hidden=4096,
        intermediate=11008,
        layers=32,
        vocab=32000,
        prompt=1024,
        steps=48,
        engine={"dtype": "bfloat16", "kv_cache_memory_bytes": 24 << 30, "gpu_memory_utilization": 0.35},
    )


@app.command()
def measure(
    tiny: bool = False,
    tune: bool = False,
    kernels: bool = True,
    engines: bool = True,
    rounds: int = 5,
    output: Path | None = None,
) -> None:
    """Measure, print, and say which goals are met."""
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # Before Triton is imported.
    elif not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is here; give --tiny to run at toy size on a CPU")
    size = tiny_size() if tiny else full_size()
    report: dict[str, Any] = {
        "machine": machine() | {"gpu": None if tiny else torch.cuda.get_device_name()},
        "versions": installed_versions(),
        "command": " ".join(["python", *sys.argv]),
    }
    if kernels:
        with torch.inference_mode():
            measure_kernels(report, size, tune)
        save(report, size, output)
    if engines:
        report["engine"] = engine_times(size, rounds)
        print_engines(report["engine"])
        save(report, size, output)
    for goal, met in goals(report, size).items():
        typer.echo(f"{'met' if met else 'MISSED'}: {goal}")


def measure_kernels(report: dict[str, Any], size: Size, tune: bool) -> None:
    """Add what concerns the kernels to the report, and print it."""
    bandwidth = copy_bandwidth(size)
    report |= {
        "copy_bytes_per_second": bandwidth,
        "accuracy": accuracy(size),
        "attention": attention_times(size, bandwidth),
        "walk_and_commit": walk_and_commit_times(size),
    }
    print_kernels(report)
    if tune:
        report["tilings"] = tiling_times(size, bandwidth)
        print_tilings(report["tilings"])
    torch.cuda.empty_cache()


def save(report: dict[str, Any], size: Size, output: Path | None) -> None:
    """Write what has been measured so far."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report | {"goals": goals(report, size)}, indent=2, default=str) + "\n")


def goals(report: dict[str, Any], size: Size) -> dict[str, bool]:
    """Say which goals are met; those of speed are for GPUs: batch 1, the most rows, the longest context up to 8k."""
    met = {}
    if "accuracy" in report:
        met["every kernel agrees with the reference"] = all(each["agrees"] for each in report["accuracy"])
    if size.device.type == "cpu":
        return met
    rows, context = size.rows[-1], max(each for each in size.contexts if each <= 8192)
    for row in report.get("attention", []):
        if (row["context"], row["rows"], row["batch"]) == (context, rows, 1):
            name = f"{row['shape']}: {rows} rows at context {context} read at {BANDWIDTH_GOAL:.0%} of a copy's rate"
            met[name] = row["share"] >= BANDWIDTH_GOAL
    for row in report.get("engine", []):
        if (row["rows"], row["batch"]) == (rows, 1):
            name = f"a step of {rows} rows takes at most {STEP_RATIO_GOAL} of a plain one"
            met[name] = row["ratio_to_plain"] <= STEP_RATIO_GOAL
    return met


def seconds(size: Size, calls: list[Callable[[], object]], repetitions: int = 10) -> float:
    """Return the median time of one of the calls, which run one after another from a CUDA graph."""
    calls[0]()
    if size.device.type == "cpu":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for repetition in range(repetitions + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repetition > 1:
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth(size: Size) -> float:
    """Return what a copy within the device's memory reads and writes per second."""
    source = torch.zeros(max(4 * size.cache_bytes, 1 << 20), dtype=torch.uint8, device=size.device)
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(size, [lambda: target.copy_(source)])


def draft_tree(rows: int) -> DraftTree:
    """Return a tree of that many rows, at most four children each."""
    return DraftTree.from_parents([-1, *((row - 1) // 4 for row in range(1, rows))])


def step_trees(tree: DraftTree, batch: int) -> StepTrees:
    """Return a step in which so many requests verify the same tree; each row's token is its index."""
    rows = torch.arange(batch * len(tree))
    return derive_trees(
        tree.parents[None, 1:].repeat(batch, 1),
        cu_num_rows=torch.arange(0, len(rows) + 1, len(tree)),
        logits_indices=rows,
        input_ids=rows.clone(),
        positions=torch.zeros_like(rows),
        max_depth=tree.depth,
        num_drafting_reqs=batch,
    )


class Attention:
    """A step in which every request verifies the same tree, and as many caches as one graph is to read."""

    def __init__(self, size: Size, shape: Shape, batch: int, context: int, tree: DraftTree) -> None:
        from vllm_medusa.attention.triton.ops import AttentionStep, LayerOptions, Workspace

        device, rows = size.device, len(tree)
        blocks = -(-(context + rows) // BLOCK_SIZE)
        self.shape, self.batch, self.context, self.tree = shape, batch, context, tree
        self.bytes = batch * (context + rows) * shape.slot_bytes
        self.block_table = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
        cache_shape = (batch * blocks, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_dim)
        self.caches = [
            torch.randn(cache_shape, dtype=shape.dtype, device=device).to(shape.cache_dtype)
            for _ in range(-(-size.cache_bytes // self.bytes))
        ]
        self.query = torch.randn(batch * rows, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
        self.output = torch.empty_like(self.query)
        trees = step_trees(tree, batch)
        self.step = AttentionStep(
            query_start_loc=torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=device),
            seq_lens=torch.full((batch,), context + rows, dtype=torch.int32, device=device),
            block_table=self.block_table,
            ancestor_bits=trees.ancestor_bits.to(device),
            depths=trees.depths.to(device),
            max_rows=rows,
        )
        scale = torch.ones((), device=device) if shape.cache_dtype != shape.dtype else None
        self.options = LayerOptions(shape.head_dim**-0.5, key_scale=scale, value_scale=scale)
        self.workspace = Workspace.allocate(shape.head_dim, max(size.batches), size.processors, device)

    def caches_of(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Return keys and values, ``[blocks, block_size, kv_heads, head_dim]`` each."""
        return self.caches[layer].transpose(1, 2).split(self.shape.head_dim, dim=-1)

    def attend(self, layer: int = 0, tiling: Any = None) -> None:
        from vllm_medusa.attention.triton.ops import tree_attention

        tree_attention(self.query, *self.caches_of(layer), self.output, self.step, self.options, self.workspace, tiling)

    def calls(self, tiling: Any = None) -> list[Callable[[], None]]:
        """Return one call per cache."""
        return [lambda layer=layer: self.attend(layer, tiling) for layer in range(len(self.caches))]

    def default_tiling(self) -> Any:
        from vllm_medusa.attention.triton.ops import choose_tiling

        shape, rows = self.shape, len(self.tree)
        return choose_tiling(
            self.batch * rows, self.batch, rows, shape.heads, shape.kv_heads, shape.head_dim,
            shape.dtype.itemsize, shape.cache_dtype.itemsize, self.workspace.programs,
        )  # fmt: skip

    def error(self) -> float:
        """Attend; return the largest difference from the reference over all requests."""
        self.attend()
        worst = 0.0
        for request, (query, output) in enumerate(
            zip(self.query.chunk(self.batch), self.output.chunk(self.batch), strict=True)
        ):
            key, value = (
                cache.float()[self.block_table[request].long()].flatten(0, 1)[: self.context + len(self.tree)]
                for cache in self.caches_of(0)
            )
            expected = reference.tree_attention(
                query.float(),
                *(key[: self.context], value[: self.context], key[self.context :], value[self.context :]),
                self.tree.ancestors.to(query.device),
                self.options.scale,
            )
            worst = max(worst, float((output.float() - expected).abs().max()))
        return worst


def accuracy(size: Size) -> list[dict[str, Any]]:
    """Compare the kernel with the dense reference."""
    results = []
    for shape, (dtype, cache_dtype), rows in product(size.shapes[:2], size.precisions, size.rows):
        tried = replace(shape, dtype=dtype, cache_dtype=cache_dtype)
        error = Attention(replace(size, cache_bytes=1), tried, 2, size.contexts[0] + 7, draft_tree(rows)).error()
        allowed = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
        results.append(
            {"shape": shape.name, "dtype": dtype, "cache": cache_dtype, "rows": rows, "error": error}
            | {"agrees": error <= allowed}
        )
    return results


def attention_times(size: Size, bandwidth: float) -> list[dict[str, Any]]:
    """Time the kernel over contexts, batches and rows."""
    results = []
    cases = list(product(size.shapes, size.contexts, size.batches, size.rows))
    for shape, context, batch, rows in track(cases, "attention", console=Console(stderr=True)):
        case = Attention(size, shape, batch, context, draft_tree(rows))
        taken = seconds(size, case.calls())
        results.append(
            {"shape": shape.name, "context": context, "batch": batch, "rows": rows, "microseconds": taken * 1e6}
            | {"share": case.bytes / taken / bandwidth, "tiling": asdict(case.default_tiling())}
        )
    return results


def tiling_times(size: Size, bandwidth: float) -> list[dict[str, Any]]:
    """Time other tilings of one request's step, best first; those that do not fit the device are left out."""
    from triton.runtime.errors import OutOfResources

    results = []
    for shape, rows in product(size.shapes, {size.rows[0], size.rows[-1]}):
        case = Attention(size, shape, 1, min(size.contexts[-1], 8192), draft_tree(rows))
        default = case.default_tiling()
        tilings = [
            replace(default, block_rows=block_rows, tile=tile, splits=splits, warps=warps, stages=stages)
            for block_rows in sorted({max(default.block_rows // 2, 16), default.block_rows})
            for tile in (32, 64, 128)
            for splits in sorted({max(default.splits // 2, 1), default.splits})
            for warps, stages in ((4, 3), (4, 5), (8, 3), (8, 4))
        ]
        for tiling in track(tilings, f"tilings, {shape.name}, {rows} rows", console=Console(stderr=True)):
            try:
                taken = seconds(size, case.calls(tiling))
            except OutOfResources:
                continue
            results.append(
                {"shape": shape.name, "rows": rows, "microseconds": taken * 1e6, "default": tiling == default}
                | {"share": case.bytes / taken / bandwidth, "tiling": asdict(tiling)}
            )
    return sorted(results, key=lambda row: (row["shape"], row["rows"], row["microseconds"]))


def walk_and_commit_times(size: Size) -> list[dict[str, Any]]:
    """Time the walk, and the commit of one branch per request in all layers of the first shape's cache."""
    from vllm_medusa.acceptance.walk_kernel import walk_drawn
    from vllm_medusa.kv_cache.kernel_commit import CacheTable, move_accepted

    shape, tree, results = size.shapes[0], draft_tree(size.rows[-1]), []
    rows = len(tree)
    for batch in size.batches:
        on_host = replace(step_trees(tree, batch), max_depth=LEVELS - 1)
        # Each row's draw is carried by its last child.
        drawn = torch.zeros_like(on_host.tokens).index_put_((on_host.parents.clamp(min=0),), on_host.tokens)
        drawn = drawn.to(size.device)
        tensors = ("cu_num_rows", "logits_indices", "tokens", "parents", "depths", "ancestor_bits")
        trees = replace(on_host, **{name: getattr(on_host, name).to(size.device) for name in tensors})
        accepted = walk_drawn(trees, drawn, rows)
        caches = [
            torch.zeros(batch * rows // BLOCK_SIZE + 1, BLOCK_SIZE, shape.kv_heads, 2 * shape.head_dim).to(
                size.device, shape.cache_dtype
            )
            for _ in range(size.layers)
        ]
        (table,) = CacheTable.group(caches)
        slots = trees.logits_indices
        walking = seconds(size, [lambda trees=trees, drawn=drawn: walk_drawn(trees, drawn, rows)])
        moving = seconds(
            size,
            [
                lambda table=table, accepted=accepted, trees=trees, slots=slots: move_accepted(
                    table, trees, accepted, slots
                )
            ],
        )
        results.append({"batch": batch, "walk_microseconds": walking * 1e6, "commit_microseconds": moving * 1e6})
    return results


def engine_times(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Time steps of engines that verify so many rows, each in turns with stock vLLM, which decodes plainly."""
    write_models(size)
    share_environment()
    os.environ.pop("TRITON_INTERPRET", None)
    results = []
    with start(1, size) as plain:
        plain.answer()
        for rows in track([rows for rows in size.rows if rows > 1], "engines", console=Console(stderr=True)):
            with start(rows, size) as tree:
                tree.answer()
                results += [compare(plain, tree, rows, batch, rounds) for batch in size.batches]
    return results


def start(rows: int, size: Size) -> Contender:
    """Start an engine's process."""
    plugins = {"VLLM_PLUGINS": "" if rows == 1 else "medusa"}
    return Contender(f"{rows} rows", serve, (rows, size), plugins, DIRECTORY / f"{rows}.log")


def compare(plain: Contender, tree: Contender, rows: int, batch: int, rounds: int) -> dict[str, Any]:
    """Let two engines decode that many requests in turns, after a round that does not count."""
    both = [(plain.ask(batch), tree.ask(batch)) for _ in range(rounds + 1)][1:]
    return {
        "rows": rows,
        "batch": batch,
        "plain_milliseconds": statistics.median(stock for (stock, _), _ in both),
        "milliseconds": statistics.median(own for _, (own, _) in both),
        "ratio_to_plain": statistics.median(own / stock for (stock, _), (own, _) in both),
        "tokens_per_step": statistics.median(tokens for _, (_, tokens) in both),
    }


def serve(connection: Connection, rows: int, size: Size) -> None:
    """Be an engine: answer a batch size with the milliseconds of a step and the tokens that a request gets of it."""
    from vllm import LLM

    heads = {"method": "medusa", "model": str(DIRECTORY / "heads"), "num_speculative_tokens": rows - 1}
    llm = LLM(
        str(DIRECTORY / "target"),
        speculative_config=heads if rows > 1 else None,
        load_format="dummy",
        max_model_len=size.prompt + size.steps * (LEVELS + 1) + rows,
        max_num_seqs=max(size.batches),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **size.engine,
    )
    connection.send(None)
    while True:
        connection.send(step_milliseconds(llm, connection.recv(), size))


def step_milliseconds(llm: Any, batch: int, size: Size) -> tuple[float, float]:
    """Decode random prompts; return the median time of a step in which all decode, and the tokens per step of one."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=size.steps, ignore_eos=True, detokenize=False)
    for _ in range(batch):
        prompt = {"prompt_token_ids": torch.randint(size.vocab, (size.prompt,)).tolist()}
        engine.add_request(str(time.monotonic_ns()), prompt, parameters)
    times, emitted = [], []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        elapsed = time.perf_counter() - start
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if len(counts) == batch and min(counts) > 2 and not any(output.finished for output in outputs):
            times.append(elapsed)
            emitted.append(sum(counts))
    growth = (emitted[-1] - emitted[0]) / (len(emitted) - 1) / batch
    return statistics.median(times) * 1e3, growth


def write_models(size: Size) -> None:
    """Write the configurations of the target and the heads; their weights are made up at loading."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.shapes[0].heads,
        num_key_value_heads=size.shapes[0].kv_heads,
        max_position_embeddings=4096,
        vocab_size=size.vocab,
        tie_word_embeddings=False,
        dtype=size.engine["dtype"],
    ).save_pretrained(DIRECTORY / "target")
    (DIRECTORY / "heads").mkdir(exist_ok=True)
    heads = {"hidden_size": size.hidden, "vocab_size": size.vocab, "num_heads": HEADS, "num_hidden_layers": 1}
    (DIRECTORY / "heads" / "config.json").write_text(json.dumps(heads))


def print_kernels(report: dict[str, Any]) -> None:
    """Print accuracy, times and shares of bandwidth."""
    typer.echo(f"a copy moves {report['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    for row in report["accuracy"]:
        if not row["agrees"]:
            typer.echo(f"differs from the reference: {row}")
    table = Table(title="Tree attention")
    for column in ("shape", "context", "batch", "rows", "µs", "of a copy's rate"):
        table.add_column(column, justify="right")
    for row in report["attention"]:
        sizes = (str(row[key]) for key in ("context", "batch", "rows"))
        table.add_row(row["shape"], *sizes, f"{row['microseconds']:.1f}", f"{row['share']:.0%}")
    Console().print(table)
    for row in report["walk_and_commit"]:
        typer.echo(
            f"batch {row['batch']}: walk {row['walk_microseconds']:.1f} µs, commit {row['commit_microseconds']:.1f} µs"
        )


def print_tilings(results: list[dict[str, Any]]) -> None:
    """Print each case's best tilings and the one that is chosen by default."""
    for _, rows in groupby(results, key=lambda row: (row["shape"], row["rows"])):
        for place, row in enumerate(rows):
            if place < 3 or row["default"]:
                name = f"{row['shape']}, {row['rows']} rows, place {place + 1}{', default' if row['default'] else ''}"
                typer.echo(f"{name}: {row['microseconds']:.1f} µs, {row['share']:.0%}, {row['tiling']}")


def print_engines(results: list[dict[str, Any]]) -> None:
    """Print one line per engine and batch."""
    table = Table(title="An engine's step")
    for column in ("batch", "rows", "plain, ms", "ms", "against plain", "tokens per step"):
        table.add_column(column, justify="right")
    for row in sorted(results, key=lambda row: (row["batch"], row["rows"])):
        table.add_row(
            str(row["batch"]),
            str(row["rows"]),
            f"{row['plain_milliseconds']:.2f}",
            f"{row['milliseconds']:.2f}",
            f"{row['ratio_to_plain']:.3f}",
            f"{row['tokens_per_step']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    app()
