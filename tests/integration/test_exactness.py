# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding with trees emits the very tokens of stock vLLM without speculation, however requests are batched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from vllm import LLM
from vllm.v1.core.sched.output import SchedulerOutput

from tests.integration.engines import (
    SpecCounters,
    Tree,
    engine,
    generate,
    generate_staggered,
    greedy,
    is_mixed,
    model_runner,
    recorded_steps,
    spec_counters,
    texts,
)
from tests.under_test import UNDER_TEST, on
from vllm_medusa.attention.cpu.fused import FusedTrees
from vllm_medusa.attention.cpu.padded import PaddedTrees
from vllm_medusa.attention.cpu.tree_pass import TreePass
from vllm_medusa.tree.best_first import IndependentHeads, best_first
from vllm_medusa.tree.static import cartesian, chain, from_choices

PROMPTS, TOKENS, MOST = on(v1=(200, 128, 16), v2=(4, 14, 3), triton=(2, 6, 2))
TREES = on(v1=("chain", "cartesian", "explicit"), v2=("explicit",), triton=("chain", "explicit"))


def tree_passes(llm: LLM) -> set[type[TreePass]]:
    if UNDER_TEST.is_v2:
        return set()
    return {group.get_metadata_builder().tree_pass for group in model_runner(llm)._attn_group_iterator()}


@dataclass(frozen=True)
class Run:
    """What one engine emitted and how."""

    nodes: int
    texts: list[list[int]]
    counters: SpecCounters
    steps: list[SchedulerOutput]
    tree_passes: set[type[TreePass]]
    """How the CPU's attention on V1 attends for trees."""


@pytest.fixture(scope="module")
def trees(tiny_heads: Path) -> dict[str, Tree]:
    accuracies = json.loads((tiny_heads / "config.json").read_text())["medusa_accuracies"]
    return {
        "chain": "chain",
        "cartesian": [3, 2, 2],
        "explicit": best_first(IndependentHeads(torch.tensor(accuracies)), 63).choices,
    }


@pytest.fixture(scope="module")
def plain(tiny_target: Path, held_out_prompts: list[list[int]]) -> list[list[int]]:
    with engine(tiny_target, max_num_seqs=64) as llm:
        return texts(generate(llm, held_out_prompts[:PROMPTS], greedy(TOKENS)))


@pytest.fixture(scope="module")
def run(
    tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]], trees: dict[str, Tree]
) -> Callable[[str], Run]:
    """Decode with a tree, requests coming and going; each tree once."""

    @cache
    def decode(name: str) -> Run:
        rows = {"chain": chain(4), "cartesian": cartesian([3, 2, 2])}.get(name) or from_choices(trees[name])
        # One row short of room for all: prompts come in pieces, and the last request's draft is cut.
        budget = MOST * len(rows) - len(rows) // 2
        with (
            engine(
                tiny_target, heads=tiny_heads, tree=trees[name], max_num_seqs=MOST, max_num_batched_tokens=budget
            ) as llm,
            recorded_steps(llm) as steps,
        ):
            outputs = generate_staggered(llm, held_out_prompts[:PROMPTS], greedy(TOKENS), most=MOST)
            return Run(len(rows) - 1, texts(outputs), spec_counters(llm), list(steps), tree_passes(llm))

    return decode


@pytest.mark.both_runners
@pytest.mark.parametrize("name", TREES)
def test_greedy_tokens_equal_those_without_speculation(
    name: str, plain: list[list[int]], run: Callable[[str], Run]
) -> None:
    emitted = run(name).texts
    assert len(emitted) == PROMPTS
    assert all(len(text) == TOKENS for text in emitted)
    different = [index for index, text in enumerate(emitted) if text != plain[index]]
    assert not different
    assert run(name).counters.accepted > 0


@pytest.mark.both_runners
@pytest.mark.skipif(UNDER_TEST.words != {"v2"}, reason="compares V2 with V1, both with the CPU's attention")
def test_both_runners_emit_the_same_tokens(
    tiny_target: Path,
    tiny_heads: Path,
    held_out_prompts: list[list[int]],
    trees: dict[str, Tree],
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with engine(tiny_target, heads=tiny_heads, tree=trees["explicit"], async_scheduling=False) as llm:
        assert type(model_runner(llm)).__module__ == "vllm_medusa.runner.v1.model_runner"
        assert texts(generate(llm, held_out_prompts[:PROMPTS], greedy(TOKENS))) == plain


@pytest.mark.parametrize("name", TREES)
def test_the_batches_compared_mix_sizes_prompt_chunks_trees_and_cut_drafts(
    name: str, run: Callable[[str], Run]
) -> None:
    result = run(name)
    sizes = {len(step.num_scheduled_tokens) for step in result.steps}
    assert sizes >= {1, MOST // 2, MOST}
    assert sum(map(is_mixed, result.steps)) >= 5
    drafts = {len(draft) for step in result.steps for draft in step.scheduled_spec_decode_tokens.values()}
    assert max(drafts) == result.nodes
    if name != "chain":  # its rows are so few that a last request with less than all of them is rare
        assert min(drafts) < result.nodes


def test_a_tree_accepts_more_than_the_chain_and_a_large_one_more_than_a_small_one(run: Callable[[str], Run]) -> None:
    lengths = [run(name).counters.acceptance_length for name in TREES]
    print("\nacceptance length:", dict(zip(TREES, lengths, strict=True)))
    assert 1 < lengths[0] < lengths[1] < lengths[2]


def test_bf16_tokens_differ_first_where_the_targets_best_logits_nearly_tie(
    tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]], trees: dict[str, Tree]
) -> None:
    """In bf16 a logit is rounded, and how depends on which rows share a kernel, with speculation or without.

    One unit in the last place for each of the two logits is what the bound allows. A draft accepted wrongly, or a row
    that attends to the wrong keys, would be off by whole logits.
    """
    candidates = 8
    prompts = held_out_prompts[:32]
    options = {"dtype": "bfloat16", "logprobs_mode": "raw_logits", "max_logprobs": candidates}
    with engine(tiny_target, **options) as llm:
        plain = generate(llm, prompts, greedy(TOKENS, logprobs=candidates))
    with engine(tiny_target, heads=tiny_heads, tree=trees["cartesian"], **options) as llm:
        emitted = texts(generate_staggered(llm, prompts, greedy(TOKENS)))
        assert spec_counters(llm).accepted > 0
    identical = 0
    for output, text in zip(plain, emitted, strict=True):
        expected = list(output.outputs[0].token_ids)
        if text == expected:
            identical += 1
            continue
        position = next(index for index, (a, b) in enumerate(zip(text, expected, strict=True)) if a != b)
        logits = {token: entry.logprob for token, entry in output.outputs[0].logprobs[position].items()}
        top = logits[expected[position]]
        ulp = 2.0 ** (math.frexp(top)[1] - 8)  # bf16 keeps 8 significant bits
        assert text[position] in logits, "not even among the best"
        assert top - logits[text[position]] <= 2 * ulp
    print(f"\nbf16: {identical} of {len(prompts)} texts identical")


def test_the_batches_compared_attend_for_trees_by_the_fused_operator(run: Callable[[str], Run]) -> None:
    assert run("cartesian").tree_passes == {FusedTrees}


def test_greedy_tokens_equal_those_without_speculation_where_pytorch_attends_for_trees(
    tiny_target: Path,
    tiny_heads: Path,
    held_out_prompts: list[list[int]],
    trees: dict[str, Tree],
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEDUSA_CPU_ATTENTION", "torch")
    with engine(tiny_target, heads=tiny_heads, tree=trees["cartesian"], max_num_batched_tokens=160) as llm:
        assert tree_passes(llm) == {PaddedTrees}
        emitted = texts(generate_staggered(llm, held_out_prompts[:24], greedy(TOKENS), most=8))
        assert spec_counters(llm).accepted > 0
    assert emitted == plain[:24]


def test_compiled_tokens_equal_those_without_speculation(
    tiny_target: Path,
    tiny_heads: Path,
    held_out_prompts: list[list[int]],
    trees: dict[str, Tree],
    plain: list[list[int]],
) -> None:
    options = {"enforce_eager": False, "max_num_seqs": 4, "max_num_batched_tokens": 128}
    with engine(tiny_target, heads=tiny_heads, tree=trees["cartesian"], **options) as llm:
        emitted = texts(generate_staggered(llm, held_out_prompts[:8], greedy(TOKENS), most=4))
        assert spec_counters(llm).accepted > 0
    assert emitted == plain[:8]
