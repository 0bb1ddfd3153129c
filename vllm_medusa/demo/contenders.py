"""Stock vLLM and draft trees, side by side: which engines are compared, and how they take turns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vllm_medusa.demo.engine import Decoded, Engine, Order, serve
from vllm_medusa.demo.process import Contender, share_environment

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
        large: the models of the timed runs.
        dtype: of the timed runs.
        num_heads: heads of both.
        trees: the options that choose the drafts of ``tree`` and ``tree_wide``.
        exact: what every contender decodes for the exact comparison.
        rounds: what every contender decodes for time, one prompt a round.
        threads: threads of each engine; only one engine works at a time.

    """

    small: Models
    large: Models
    dtype: str
    num_heads: int
    trees: dict[str, dict[str, Any]]
    exact: Order
    rounds: list[Order]
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    def speculative_config(self, name: str, heads: Path) -> dict[str, Any] | None:
        """Return a contender's ``speculative_config``."""
        if name == PLAIN:
            return None
        if name == NATIVE_CHAIN:
            return {"method": "medusa", "model": str(heads), "num_speculative_tokens": self.num_heads}
        return {"method": "medusa", "model": str(heads), **self.trees[name]}

    def start(self, name: str, directory: Path) -> Contender:
        """Start a contender's process, its log in ``directory``; stock contenders leave the plugin out."""
        exact, timed = (
            Engine(str(models.target), dtype, self.speculative_config(name, models.heads))
            for models, dtype in ((self.small, "float32"), (self.large, self.dtype))
        )
        plugins = {"VLLM_PLUGINS": "" if name in (PLAIN, NATIVE_CHAIN) else "medusa"}
        arguments = (exact, self.exact, timed, self.threads)
        return Contender(name, serve, arguments, plugins, directory / f"{name}.log")


@dataclass(frozen=True)
class Run:
    """All that one contender did.

    Attributes:
        exact: the exact run.
        rounds: the timed runs.

    """

    exact: Decoded
    rounds: list[Decoded]


def compare(comparison: Comparison, names: Sequence[str], directory: Path, console: Console) -> dict[str, Run]:
    """Let contenders take turns.

    Args:
        comparison: what they do.
        names: the contenders.
        directory: where their logs go.
        console: where progress is shown.

    """
    share_environment()
    with ExitStack() as stack:
        contenders = [stack.enter_context(comparison.start(name, directory)) for name in names]
        runs: dict[str, Run] = {}
        for contender in track(contenders, "Starting engines, checking texts", console=console):
            runs[contender.name] = Run(contender.answer(), [])
            contender.answer()
        for contender in track(contenders, "Warming up", console=console):
            contender.ask(comparison.rounds[0])
        for order in track(comparison.rounds, "Taking turns", console=console):
            for contender in contenders:
                runs[contender.name].rounds.append(contender.ask(order))
    return runs


def fastest_dtype() -> str:
    """Return bf16 where the CPU multiplies it, else fp32: without such instructions rows cost several times as much."""
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("bf16") else "float32"
