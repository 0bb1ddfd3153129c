# SPDX-License-Identifier: Apache-2.0
"""Sampling with trees draws from the target's own distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

from tests.integration.engines import engine, generate, spec_counters, texts
from vllm_medusa.acceptance.exact import Draw, Walk, walk
from vllm_medusa.checkpoint.format import HeadsSpec, write_heads
from vllm_medusa.runner.v1 import model_runner as v1
from vllm_medusa.step.trees import StepTrees

VOCAB, HIDDEN, LENGTH, DRAWS = 9, 64, 3, 20_000
PROMPT = [1, 5, 2, 7]
TREE = [[0], [1], [2], [3], [0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [3, 2], [0, 0, 0], [1, 0, 1]]
SETTINGS = {"temperature": {"temperature": 1.0}, "top_p": {"temperature": 1.0, "top_p": 0.8}}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose few tokens have clearly different probabilities, in every context others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    directory = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[{}, {"medusa_lookup_weights": [[0.3, 0.6]] * 3}], ids=["heads alone", "lookup"])
def heads(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(1)
    spec = HeadsSpec(hidden_size=HIDDEN, vocab_size=VOCAB, num_heads=3, fc_bias=False)
    state = {f"blocks.{head}.layers.0.weight": torch.randn(HIDDEN, HIDDEN) / 8 for head in range(3)}
    state |= {f"lm_heads.{head}.weight": torch.randn(VOCAB, HIDDEN) for head in range(3)}
    return write_heads(tmp_path_factory.mktemp("heads") / "heads", spec, state, request.param)


@pytest.fixture(scope="module")
def llm(target: Path, heads: Path) -> Iterator[LLM]:
    options = {"max_model_len": 32, "max_num_seqs": 512, "max_num_batched_tokens": 8192}
    with engine(target, heads=heads, tree=TREE, **options) as llm:
        yield llm


@torch.inference_mode()
def exact_distribution(target: Path, top_p: float = 1.0) -> torch.Tensor:
    """Return the probability of each text, ``[VOCAB] * LENGTH``, from the plain model."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    joint = torch.ones((), dtype=torch.float64)
    for length in range(LENGTH):
        prefixes = torch.tensor(list(product(range(VOCAB), repeat=length)), dtype=torch.long)
        prompts = torch.cat([torch.tensor(PROMPT).expand(len(prefixes), -1), prefixes], dim=1)
        probabilities = model(prompts).logits[:, -1].double().softmax(dim=-1)
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
        joint = joint[..., None] * probabilities.view([VOCAB] * (length + 1))
    return joint


def p_value(emitted: list[list[int]], expected: torch.Tensor) -> float:
    """Test counts of texts against their distribution by chi-square, texts expected less than 5 times pooled."""
    counts = Counter(map(tuple, emitted))
    observed = torch.zeros_like(expected)
    for text, count in counts.items():
        observed[text] = count
    assert not observed[expected == 0].any(), "a text that the target never emits"
    expected = expected * len(emitted)
    rare = expected < 5
    cells = [
        torch.cat([table[~rare], table[rare].sum()[None]] if expected[rare].sum() > 0 else [table[~rare]])
        for table in (observed, expected)
    ]
    return float(chisquare(cells[0].numpy(), cells[1].numpy()).pvalue)


def emit(llm: LLM, draws: int, **options: Any) -> list[list[int]]:
    """Draw the first tokens of a text again and again, each with its own seed."""
    params = [
        SamplingParams(seed=seed, max_tokens=LENGTH, ignore_eos=True, detokenize=False, **options)
        for seed in range(draws)
    ]
    return texts(generate(llm, [PROMPT] * draws, params))


def walk_that_favours_first_children(trees: StepTrees, draw: Draw, share: float = 0.1) -> Walk:
    """Walk, but accept a row's first child now and then whatever was drawn."""

    def biased(row: torch.Tensor, walking: torch.Tensor) -> torch.Tensor:
        drawn = draw(row, walking)
        is_child = trees.parents[None, :] == row[:, None]
        first = trees.tokens[is_child.long().argmax(dim=1)]
        return torch.where(is_child.any(dim=1) & (torch.rand(len(row)) < share), first, drawn)

    return walk(trees, biased)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_texts_have_the_targets_joint_distribution(options: dict[str, float], llm: LLM, target: Path) -> None:
    before = spec_counters(llm)
    emitted = emit(llm, DRAWS, **options)
    counters = spec_counters(llm) - before
    assert counters.accepted > DRAWS / 4
    assert p_value(emitted, exact_distribution(target, options.get("top_p", 1.0))) > 1e-3


def test_a_walk_that_favours_drafts_fails_the_same_test(
    llm: LLM, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v1, "walk", walk_that_favours_first_children)
    assert p_value(emit(llm, DRAWS // 4, temperature=1.0), exact_distribution(target)) < 1e-6
