# SPDX-License-Identifier: Apache-2.0
"""Tokens per step by kind of heads and by number of nodes; ``spec_bench.py --compare-heads`` runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dialogues import Answers, Batch, ask_all, tokens_per_step
from vllm_medusa.demo.contenders import NATIVE_CHAIN, PLAIN, TITLES
from vllm_medusa.demo.engine import Engine
from vllm_medusa.progress import track

BUDGET = {"medusa_budget": "off"}
"""All nodes are verified, whatever they cost on this machine."""

LOOKUP = {"": False, ", lookup": True}
"""What is added to the name of a kind of heads, and whether paths are looked up in the text."""

CHAIN = {"medusa_tree": "chain", **BUDGET}
NODES = (4, 7, 15, 31)


@dataclass(frozen=True)
class Entry:
    """An engine of the comparison: whose heads it has, and how many nodes of which tree."""

    kind: str
    tree: str


@dataclass(frozen=True)
class Found:
    """What an engine did: its tokens per step, and the share of questions answered with plain decoding's tokens."""

    tokens_per_step: float
    identical_texts: float


def trees() -> dict[str, dict[str, Any]]:
    """Return the options of each tree."""
    grown = {"medusa_tree": "dynamic", **BUDGET}
    return {"chain": CHAIN, **{f"tree_{nodes}": {**grown, "num_speculative_tokens": nodes} for nodes in NODES}}


def entries(heads: Mapping[str, Path], native: dict[str, Any] | None) -> dict[Entry, dict[str, Any] | None]:
    """Return the ``--speculative-config`` of each engine: vLLM's own chain, and each kind of heads with each tree.

    Each kind is there twice, without and with lookup.
    """
    configs: dict[Entry, dict[str, Any] | None] = {Entry(NATIVE_CHAIN, "chain"): native}
    for (suffix, looks_up), (kind, directory), (tree, options) in product(
        LOOKUP.items(), heads.items(), trees().items()
    ):
        medusa = {"method": "medusa", "model": str(directory), "medusa_lookup": looks_up, **options}
        configs[Entry(f"{kind}{suffix}", tree)] = medusa
    return configs


def compare(
    heads: Mapping[str, Path], native: dict[str, Any] | None, plain: Engine, batches: Sequence[Batch]
) -> dict[Entry, Found]:
    """Let one engine after another answer: tokens per step do not depend on what else the machine does.

    Args:
        heads: each kind's heads.
        native: the options of vLLM's own chain.
        plain: the engine without speculation.
        batches: the questions.

    """
    reference = ask_all(PLAIN, plain, batches)
    found = {}
    for entry, config in track(list(entries(heads, native).items()), "Heads and trees"):
        name = entry.kind if entry.kind == NATIVE_CHAIN else f"{entry.kind}_{entry.tree}".replace(", ", "_")
        answers = ask_all(name, replace(plain, speculative_config=config), batches)
        found[entry] = Found(tokens_per_step(answers), share_of_same(answers, reference))
    return found


def share_of_same(answers: Sequence[Answers], reference: Sequence[Answers]) -> float:
    """Return the share of questions whose answers have the same tokens."""
    pairs = [pair for a, b in zip(answers, reference, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def as_json(found: Mapping[Entry, Found]) -> dict[str, Any]:
    """Return the figures by kind of heads and tree, and each kind's tokens per step against the first kind's."""
    kinds = [kind for kind in dict.fromkeys(entry.kind for entry in found) if kind != NATIVE_CHAIN]

    def figures(kind: str, tree: str) -> dict[str, float]:
        own, first = found[Entry(kind, tree)], found[Entry(kinds[0], tree)]
        return {
            "tokens_per_step": own.tokens_per_step,
            "against_first": own.tokens_per_step / first.tokens_per_step,
            "identical_texts": own.identical_texts,
        }

    native = found[Entry(NATIVE_CHAIN, "chain")]
    return {
        "heads": {kind: {tree: figures(kind, tree) for tree in trees()} for kind in kinds},
        NATIVE_CHAIN: {"tokens_per_step": native.tokens_per_step, "identical_texts": native.identical_texts},
    }


def print_comparison(found: Mapping[Entry, Found], console: Console) -> None:
    """Print tokens per step by tree and kind of heads."""
    results = as_json(found)
    table = Table(title="Tokens per step by heads and tree, greedy")
    table.add_column("tree")
    for kind in results["heads"]:
        table.add_column(kind, justify="right")
    table.add_column("same texts", justify="right")
    for tree in trees():
        row = [of_kind[tree] for of_kind in results["heads"].values()]
        cells = [f"{each['tokens_per_step']:.2f} ({each['against_first']:.2f}x)" for each in row]
        table.add_row(tree.replace("_", " of "), *cells, f"{min(each['identical_texts'] for each in row):.0%}")
    console.print(table)
    native = found[Entry(NATIVE_CHAIN, "chain")]
    console.print(f"{TITLES[NATIVE_CHAIN]}: {native.tokens_per_step:.2f}, same texts {native.identical_texts:.0%}")
