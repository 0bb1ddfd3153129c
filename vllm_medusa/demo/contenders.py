# SPDX-License-Identifier: Apache-2.0
"""Compare stock vLLM and draft trees: the engines, and how they take turns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.demo.engine import Decoded, Engine, Order, serve
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.progress import track

PLAIN, NATIVE_CHAIN, TREE, TREE_WIDE = "plain", "native_chain", "tree", "tree_wide"


@dataclass(frozen=True)
class Models:
    target: Path
    heads: Path


@dataclass(frozen=True)
class Comparison:
    """What every contender decodes, and with which models and options.

    Attributes:
        small: the models of the exact runs, in fp32.
        large: the models of the timed runs.
        dtype: the dtype of the timed runs.
        num_heads: number of heads of both.
        trees: the speculative options of ``tree`` and ``tree_wide``.
        exact: the prompts of the exact run.
        rounds: the prompts of the timed runs, one per round.
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
        return speculative_config(name, heads, {NATIVE_CHAIN: native_chain(self.num_heads), **self.trees})

    def start(self, name: str, directory: Path) -> Contender:
        """Start a contender's process with its log in ``directory``; stock vLLM runs without the plugin."""
        exact, timed = (
            Engine(str(models.target), dtype, self.speculative_config(name, models.heads))
            for models, dtype in ((self.small, "float32"), (self.large, self.dtype))
        )
        arguments = (exact, self.exact, timed, self.threads)
        return Contender(name, serve, arguments, plugins(name), directory / f"{name}.log")


def native_chain(num_heads: int) -> dict[str, Any]:
    """Return the options of vLLM's own chain, as deep as there are heads."""
    return {"num_speculative_tokens": num_heads}


def speculative_config(name: str, heads: Path, options: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return a contender's ``--speculative-config``, given each one's options besides method and heads."""
    return None if name == PLAIN else {"method": "medusa", "model": str(heads), **options[name]}


def plugins(name: str) -> dict[str, str]:
    """Return the environment in which stock vLLM runs without the plugin."""
    return {"VLLM_PLUGINS": "" if name in (PLAIN, NATIVE_CHAIN) else "medusa"}


@dataclass(frozen=True)
class Run:
    """One contender's exact run and timed runs."""

    exact: Decoded
    rounds: list[Decoded]


def compare(comparison: Comparison, names: Sequence[str], directory: Path) -> dict[str, Run]:
    """Run the named contenders, which take turns; their logs go into ``directory``."""
    share_environment()
    with ExitStack() as stack:
        contenders = [stack.enter_context(comparison.start(name, directory)) for name in names]
        runs: dict[str, Run] = {}
        for contender in track(contenders, "Starting engines, checking texts"):
            runs[contender.name] = Run(contender.answer(), [])
            contender.answer()
        for contender in track(contenders, "Warming up"):
            contender.ask(comparison.rounds[0])
        for order in track(comparison.rounds, "Taking turns"):
            for contender in contenders:
                runs[contender.name].rounds.append(contender.ask(order))
    return runs


def fastest_dtype() -> str:
    """Return bf16 if the CPU has instructions for it, else fp32: emulated bf16 makes rows several times as costly."""
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("bf16") else "float32"
