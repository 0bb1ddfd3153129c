"""Engines in processes of their own, which take turns at the same prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import track

PLAIN, NATIVE_CHAIN, TREE, TREE_WIDE = "plain", "native_chain", "tree", "tree_wide"


@dataclass(frozen=True)
class Models:
    """The directories of a target and its heads."""

    target: Path
    heads: Path


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on what.

    Attributes:
        small: the models of the exact runs, in fp32.
        large: the models of the timed runs, in bf16.
        num_heads: heads of both.
        trees: the drafts of ``tree`` and ``tree_wide``, as ``medusa_tree`` takes them.
        exact_prompts: token ids that every contender decodes for the exact comparison.
        timed_prompts: token ids that every contender decodes for time, one at a time.
        rounds: in how many rounds the contenders take turns; the prompts are dealt out over them.
        tokens: new tokens per prompt.
        threads: threads of each engine; only one engine works at a time.

    """

    small: Models
    large: Models
    num_heads: int
    trees: dict[str, list[list[int]]]
    exact_prompts: list[list[int]]
    timed_prompts: list[list[int]]
    rounds: int = 4
    tokens: int = 128
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    def speculative_config(self, name: str, heads: Path) -> dict[str, Any] | None:
        """Return a contender's ``speculative_config``."""
        if name == PLAIN:
            return None
        if name == NATIVE_CHAIN:
            return {"method": "medusa", "model": str(heads), "num_speculative_tokens": self.num_heads}
        tree = self.trees[name]
        return {
            "method": "medusa",
            "model": str(heads),
            "num_speculative_tokens": len(tree),
            "medusa_tree": tree,
        }

    def order(self, name: str) -> dict[str, Any]:
        """Return what a contender's process is told at its start."""
        engines = {
            kind: {
                "model": str(models.target),
                "dtype": dtype,
                "speculative_config": self.speculative_config(name, models.heads),
            }
            for kind, models, dtype in (("exact", self.small, "float32"), ("timed", self.large, "bfloat16"))
        }
        return {**engines, "threads": self.threads, "prompts": self.exact_prompts, "tokens": self.tokens}


@dataclass(frozen=True)
class Decoded:
    """What a contender answers."""

    texts: list[list[int]]
    seconds: float
    drafts: int
    accepted: int


class Contender:
    """One engine's process.

    Args:
        name: the contender.
        comparison: what it takes part in.
        directory: where its order and its log go.

    """

    def __init__(self, name: str, comparison: Comparison, directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        order = directory / f"{name}.json"
        order.write_text(json.dumps(comparison.order(name)))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_medusa.demo.serve", str(order)],
                env=_environment(name, comparison.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """Decode one prompt on the large model."""
        assert self.process.stdin is not None
        print(json.dumps({"prompt": list(prompt), "tokens": tokens}), file=self.process.stdin, flush=True)
        return Decoded(**self.answer())

    def answer(self) -> dict[str, Any]:
        """Wait for the process's next line.

        Raises:
            RuntimeError: the process ended instead.

        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"contender {self.name!r} ended early; the end of {self.log}:\n{tail}")
        return json.loads(line)


@dataclass(frozen=True)
class Run:
    """All that one contender did.

    Attributes:
        exact: the exact run, all prompts at once.
        rounds: for each round the timed runs, in the order of its prompts.

    """

    exact: Decoded
    rounds: list[list[Decoded]]


def compare(comparison: Comparison, names: Sequence[str], directory: Path, console: Console) -> dict[str, Run]:
    """Let contenders take turns.

    Args:
        comparison: what they do.
        names: the contenders.
        directory: where their logs go.
        console: where progress is shown.

    """
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(name, comparison, directory)) for name in names]
        exact: dict[str, Decoded] = {}
        for contender in track(contenders, "Starting engines, checking texts", console=console):
            exact[contender.name] = Decoded(**contender.answer())
            contender.answer()
        runs = {name: Run(exact[name], []) for name in names}
        for index in track(range(comparison.rounds), "Taking turns", console=console):
            prompts = comparison.timed_prompts[index :: comparison.rounds]
            for contender in contenders:
                decoded = [contender.decode(prompt, comparison.tokens) for prompt in prompts]
                runs[contender.name].rounds.append(decoded)
    return runs


def _environment(name: str, threads: int) -> dict[str, str]:
    """Return the same environment for all but the plugin: stock contenders leave it out."""
    preload = [str(path) for path in Path(sys.prefix, "lib").glob("libiomp5.so")]
    return os.environ | {
        "VLLM_PLUGINS": "" if name in (PLAIN, NATIVE_CHAIN) else "medusa",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": ":".join(preload),
    }
