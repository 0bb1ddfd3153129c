# SPDX-License-Identifier: Apache-2.0
"""What is measured: at full size on a GPU, at toy size without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_bench import attention, kernels, lineup
from gpu_bench.engines import EngineOptions
from gpu_bench.lineup import Entrant, HeadsFiles, Lineup, Part
from gpu_bench.models import AttentionShape, Heads, Target, write_heads, write_target
from gpu_bench.timing import FLOAT8

DIRECTORY = Path("build/gpu")
CACHE_BYTES = 1 << 29
"""Several times what an L2 cache holds."""

WHOLE = {"medusa_budget": "off"}
"""Every node is verified, since a step is known by its rows; with made-up weights a budget would verify none."""


@dataclass(frozen=True)
class Settings:
    """Sizes of everything.

    Attributes:
        kernels: rates, and the kernels around a step.
        layers: attention layers.
        attention: the steps that they are measured with.
        target: the race's target.
        num_heads: of its heads.
        truncated_vocab: tokens that truncated heads can draft.
        race: the race.
        options: of all engines.

    """

    kernels: kernels.Sizes
    layers: tuple[AttentionShape, ...]
    attention: attention.Sizes
    target: Target
    num_heads: int
    truncated_vocab: int
    race: lineup.Sizes
    options: EngineOptions


def full(rounds: int) -> Settings:
    """Return a 7B-shaped Llama's sizes, with four query heads to a KV head."""
    grouped = AttentionShape("8 KV heads", 32, 8, 128)
    target = Target(hidden=4096, intermediate=14336, layers=32, vocab=32000, attention=grouped)
    nodes, requests = 63, (1, 8, 32, 128)
    return Settings(
        kernels=kernels.Sizes(
            device="cuda",
            dtypes=("bfloat16", "float16", FLOAT8),
            copied_bytes=4 * CACHE_BYTES,
            side=8192,
            rows=nodes + 1,
            requests=requests,
            layers=target.layers,
            shape=grouped,
        ),
        layers=(
            AttentionShape("32 KV heads", 32, 32, 128),
            grouped,
            AttentionShape("8 KV heads, fp8 cache", 32, 8, 128, cache_dtype=FLOAT8),
        ),
        attention=attention.Sizes(
            contexts=(1024, 8192, 32768),
            requests=requests,
            rows=(1, 16, 32, 64),
            most_tokens=8192 * 33,
            read_bytes=CACHE_BYTES,
            checked_contexts=(131, 4099),
        ),
        target=target,
        num_heads=4,
        truncated_vocab=8192,
        race=lineup.Sizes(requests=requests, prompt=192, steps=8, rounds=rounds, nodes=nodes),
        options=EngineOptions(tiny=False, dtype="bfloat16", max_num_batched_tokens=8192, block_size=16),
    )


def tiny(rounds: int) -> Settings:
    """Return toy sizes, for Triton's interpreter, which multiplies no bfloat16."""
    shape = AttentionShape("toy", 4, 2, 32, "float32", "float32")
    nodes, requests = 7, (1, 3)
    return Settings(
        kernels=kernels.Sizes(
            device="cpu",
            dtypes=("float32",),
            copied_bytes=1 << 24,
            side=256,
            rows=nodes + 1,
            requests=requests,
            layers=2,
            shape=shape,
        ),
        layers=(shape,),
        attention=attention.Sizes(
            contexts=(40, 70),
            requests=(1, 2),
            rows=(1, nodes + 1),
            most_tokens=256,
            read_bytes=1 << 16,
            checked_contexts=(33,),
        ),
        target=Target(hidden=128, intermediate=256, layers=2, vocab=512, attention=shape),
        num_heads=3,
        truncated_vocab=64,
        race=lineup.Sizes(requests=requests, prompt=8, steps=2, rounds=rounds, nodes=nodes),
        options=EngineOptions(tiny=True, dtype="float32", max_num_batched_tokens=256, block_size=128),
    )


def made_up(settings: Settings, parts: frozenset[Part]) -> Lineup:
    """Write a target's and heads' configurations, and let them race on random prompts."""
    target, dtype = settings.target, settings.options.dtype
    variants = {
        "shared LM head": Heads(target.hidden, target.vocab, 1, True, dtype),
        "truncated LM heads": Heads(target.hidden, settings.truncated_vocab, 1, False, dtype),
        "own LM heads": Heads(target.hidden, target.vocab, 1, False, dtype),
    }
    shared, truncated, own = (
        HeadsFiles(write_heads(DIRECTORY / name.replace(" ", "-"), sizes, settings.num_heads, target.vocab), sizes)
        for name, sizes in variants.items()
    )
    sizes, cost, static = settings.race, parts - {Part.RACE}, _tree("sparse", settings)
    entrants = [
        *_entrants(settings, shared, settings.num_heads, parts, has_step_goal=True),
        Entrant("static, truncated LM heads", truncated, static, cost, has_step_goal=True),
        Entrant("static, own LM heads", own, static, cost),
    ]
    prompts = torch.randint(target.vocab, (max(sizes.requests), sizes.prompt)).tolist()
    directory = write_target(DIRECTORY / "target", target)
    return Lineup(target, directory, _taking_part(entrants), settings.num_heads, prompts, is_made_up=True)


def given(settings: Settings, directory: Path, heads: Path, text: Path, parts: frozenset[Part]) -> Lineup:
    """Let a target and heads race that are given, on a text.

    Raises:
        ValueError: the target is no Llama, or the text too short.

    """
    target = Target.of(directory, settings.options.dtype)
    files, num_heads = HeadsFiles(heads, Heads.of(heads, target)), Heads.number_in(heads)
    entrants = _entrants(settings, files, num_heads, parts, has_step_goal=False)
    prompts = prompts_of(text, directory, settings.race)
    return Lineup(target, directory, _taking_part(entrants), num_heads, prompts, is_made_up=False)


def prompts_of(text: Path, target: Path, sizes: lineup.Sizes) -> list[list[int]]:
    """Cut prompts out of a text, evenly.

    Raises:
        ValueError: the text is too short.

    """
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(target)(text.read_text(encoding="utf-8"))["input_ids"]
    count = max(sizes.requests)
    if len(tokens) < sizes.prompt + count:
        raise ValueError(f"--text: {text} has {len(tokens)} tokens; give at least {sizes.prompt + count}")
    stride = (len(tokens) - sizes.prompt) // count
    return [tokens[first : first + sizes.prompt] for first in range(0, stride * count, stride)]


def _entrants(
    settings: Settings, heads: HeadsFiles, num_heads: int, parts: frozenset[Part], has_step_goal: bool
) -> list[Entrant]:
    return [
        Entrant("plain", None, {}, parts),
        Entrant(f"chain of {num_heads}", heads, {"medusa_tree": "chain", **WHOLE}, parts & {Part.RACE}),
        Entrant("static", heads, _tree("sparse", settings), parts, has_step_goal),
        Entrant("dynamic", heads, _tree("dynamic", settings), parts - {Part.STEP}),
    ]


def _tree(kind: str, settings: Settings) -> dict[str, object]:
    return {"medusa_tree": kind, "num_speculative_tokens": settings.race.nodes, **WHOLE}


def _taking_part(entrants: Sequence[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if entrant.parts]
