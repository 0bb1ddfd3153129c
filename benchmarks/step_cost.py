"""What a step costs by its number of rows: tree steps of vllm_medusa against chain steps of stock vLLM.

Both verify drafts that are random, so nothing is accepted and every step has the same rows; both run the same target,
one request, in a process each, and take turns. A third contender adds the heads to ours. Weights are random: a step
costs the same whatever they are.

    python benchmarks/step_cost.py --rows 1 --rows 8 --rows 16 --output build/step_cost.json
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

DIRECTORY = Path("build/step_cost")
HIDDEN, LAYERS, VOCAB, HEADS = 1024, 16, 4096, 4
PROMPT_TOKENS, STEPS = 128, 40
MESSAGE = "\x1e"
"""Starts a contender's line that is meant for us, among whatever vLLM prints."""

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
def measure(rows: list[int] = [1, 8, 16], rounds: int = 5, output: Path | None = None) -> None:  # noqa: B006
    """Measure step times, interleaved, and print them with their ratios."""
    prepare_models()
    contenders = {
        (kind, count): Contender(kind, count)
        for count in rows
        for kind in (("stock",) if count == 1 else ("stock", "tree", "tree + heads"))
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    ratios: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
        for key, contender in contenders.items():
            times[key].append(contender.ask("step"))
        for kind, count in contenders:
            ratios[kind, count].append(times[kind, count][-1] / times["stock", count][-1])
    commits = {count: contenders["tree", count].ask("commit") for kind, count in contenders if kind == "tree"}
    for contender in contenders.values():
        contender.close()

    table = Table(title=f"ms per step, one request after {PROMPT_TOKENS} tokens, median of {rounds} rounds")
    for column in ("rows", "contender", "ms", "against stock", "commit, share of the step"):
        table.add_column(column)
    results = []
    for (kind, count), values in times.items():
        step = statistics.median(values)
        commit = commits[count] / step if kind == "tree" else None
        row = {
            "rows": count,
            "contender": kind,
            "milliseconds": step,
            "ratio_to_stock": statistics.median(ratios[kind, count]),
            "commit_share": commit,
        }
        results.append(row)
        share = "" if commit is None else f"{commit:.2%}"
        table.add_row(str(count), kind, f"{step:.1f}", f"{row['ratio_to_stock']:.3f}", share)
    Console().print(table)
    report = {"machine": machine(), "command": " ".join(sys.argv), "results": results}
    Console().print_json(json.dumps({key: report[key] for key in ("machine", "command")}))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2))


class Contender:
    """An engine in a process of its own."""

    def __init__(self, kind: str, rows: int) -> None:
        environment = os.environ | {
            "VLLM_PLUGINS": "" if kind == "stock" else "medusa",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        libraries = [str(path) for path in Path(sys.prefix, "lib").glob("libiomp5.so")]
        environment["LD_PRELOAD"] = ":".join(libraries)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", kind, str(rows)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MESSAGE):
                return float(line[1:])
        raise RuntimeError(f"a contender ended early: {self.process.args}")


@app.command(hidden=True)
def serve(kind: str, rows: int) -> None:
    """Be a contender: answer ``step`` and ``commit`` with milliseconds."""
    import torch
    from vllm import LLM, SamplingParams

    options: dict[str, Any] | None = None
    if kind == "stock" and rows > 1:
        options = {"method": "custom_class", "model": "step_cost.RandomDrafts", "num_speculative_tokens": rows - 1}
    elif kind != "stock":
        options = {"method": "medusa", "model": str(DIRECTORY / "heads"), "num_speculative_tokens": rows - 1}
        if kind == "tree":
            from vllm_medusa.proposer import MedusaProposer

            MedusaProposer.propose = lambda _, hidden: torch.randint(VOCAB, (len(hidden), rows - 1))
    llm = LLM(
        str(DIRECTORY / "target"),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 28,
        speculative_config=options,
        max_num_seqs=4,
    )
    engine = llm.llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def steps() -> float:
        prompt = {"prompt_token_ids": [random.randrange(VOCAB) for _ in range(PROMPT_TOKENS)]}
        parameters = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
        engine.add_request(str(time.monotonic_ns()), prompt, parameters)
        times = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:]) * 1e3

    def commit() -> float:
        from vllm_medusa.acceptance.exact import Walk
        from vllm_medusa.runner.step import plan_step

        plan = plan_step(
            runner._table,
            kind=torch.tensor([1]),
            num_drafts=torch.tensor([rows - 1]),
            token=torch.arange(rows),
            token_ids=torch.zeros(rows, dtype=torch.long),
            seq_lens=torch.tensor([PROMPT_TOKENS + rows]),
        )
        accepted = Walk(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 2, 4, rows - 1]]))
        slots = [table.slot_mapping.gpu for table in runner.input_batch.block_table.block_tables]
        times = []
        for _ in range(50):
            start = time.perf_counter()
            runner._commit(plan, accepted, slots)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    steps()
    print(f"{MESSAGE}0", flush=True)
    for line in sys.stdin:
        print(f"{MESSAGE}{steps() if line.strip() == 'step' else commit()}", flush=True)


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


def machine() -> dict[str, Any]:
    """Say what this ran on."""
    import torch

    from vllm_medusa.compat import vllm_version

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "vllm": str(vllm_version()),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    app()
