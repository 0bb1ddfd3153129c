# SPDX-License-Identifier: Apache-2.0
"""Whatever an engine reports of its draws, it reports with trees as stock vLLM does without speculation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm import LLM, CompletionOutput, SamplingParams

from tests.integration.engines import engine, generate, spec_counters
from tests.under_test import UNDER_TEST, on

pytestmark = pytest.mark.both_runners

TOKENS = on(v1=24, v2=8)
SAMPLED = {"temperature": 0.6, "top_k": 5, "top_p": 0.95, "seed": 7}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 3},
    "sampled": {**SAMPLED, "logprobs": 3},
    "bias": {**SAMPLED, "logit_bias": dict.fromkeys(range(3, 60), -1.5), "logprobs": 1},
    "penalties": {**SAMPLED, "frequency_penalty": 0.8, "repetition_penalty": 1.3, "logprobs": 3},
}
"""Requests of two batches: in the first no request's logits depend on its path, so V2 draws all rows at once."""
TOKEN_IDS: dict[str, Any] = {"temperature": 0.0, "logprob_token_ids": [5, 17, 400]}
VOCAB_SIZE = 1024
MODES = ["raw_logprobs", "processed_logprobs", "processed_logits"]
OPTIONS: dict[str, Any] = {"max_num_batched_tokens": 4096}
MASKED: dict[str, Any] = OPTIONS | {"logprobs_mode": "processed_logprobs", "return_sampling_mask": True}


def seeded(seeds: int) -> dict[str, dict[str, Any]]:
    """The requests that have a sampling mask, once for each seed."""
    drawn = {name: each for name, each in REQUESTS.items() if "top_k" in each}
    return {f"{name} {seed}": {**each, "seed": seed} for name, each in drawn.items() for seed in range(seeds)}


@pytest.fixture(scope="module")
def prompt(held_out_prompts: list[list[int]]) -> list[int]:
    return held_out_prompts[3]


def run(llm: LLM, requests: dict[str, dict[str, Any]], prompt: list[int]) -> dict[str, CompletionOutput]:
    """Run the requests together, those with penalties after the others."""
    common = {"max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    before, found = spec_counters(llm), {}
    for penalties in (False, True):
        batch = {name: each for name, each in requests.items() if ("penalties" in name) == penalties}
        outputs = generate(llm, [prompt] * len(batch), [SamplingParams(**each, **common) for each in batch.values()])
        found.update({name: output.outputs[0] for name, output in zip(batch, outputs, strict=True)})
    speculates = llm.llm_engine.vllm_config.speculative_config is not None
    assert not speculates or (spec_counters(llm) - before).accepted > len(requests)
    return found


def scores(completion: CompletionOutput) -> list[list[float]]:
    """For each token, its score and rank, then the scores of the best tokens, which may be tied."""
    assert completion.logprobs is not None
    return [
        [each[token].logprob, each[token].rank, *sorted((entry.logprob for entry in each.values()), reverse=True)]
        for token, each in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def assert_same(found: dict[str, CompletionOutput], expected: dict[str, CompletionOutput]) -> None:
    """Assert that completions have the expected ones' tokens, masks and scores."""
    for name, completion in found.items():
        assert completion.token_ids == expected[name].token_ids, name
        assert completion.sampling_mask == expected[name].sampling_mask, name
        for after_each, before_each in zip(scores(completion), scores(expected[name]), strict=True):
            assert after_each == pytest.approx(before_each, abs=1e-3), name


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_of_every_mode_equal_those_without_speculation(
    mode: str, tiny_target: Path, tiny_heads: Path, prompt: list[int]
) -> None:
    requests = REQUESTS | ({"token_ids": TOKEN_IDS} if UNDER_TEST.is_v2 else {})
    options = OPTIONS | {"logprobs_mode": mode}
    with engine(tiny_target, **options) as llm:
        expected = run(llm, requests, prompt)
    with engine(tiny_target, heads=tiny_heads, **options) as llm:
        found = run(llm, requests, prompt)
    assert_same(found, expected)
    if UNDER_TEST.is_v2:
        assert all(set(TOKEN_IDS["logprob_token_ids"]) <= set(each) for each in found["token_ids"].logprobs or ())


@pytest.fixture(scope="module")
def masked(tiny_target: Path, prompt: list[int]) -> dict[str, CompletionOutput]:
    """Stock vLLM's completions, each with its masks."""
    with engine(tiny_target, **MASKED) as llm:
        found = run(llm, seeded(3), prompt)
    assert all(completion.sampling_mask is not None for completion in found.values())
    return found


@pytest.fixture(scope="module")
def masking(masked: dict[str, CompletionOutput], tiny_target: Path, tiny_heads: Path) -> Iterator[LLM]:
    with engine(tiny_target, heads=tiny_heads, **MASKED) as llm:
        yield llm


@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="vLLM has sampling masks on V2 only")
def test_sampling_masks_equal_those_without_speculation(
    masking: LLM, masked: dict[str, CompletionOutput], prompt: list[int]
) -> None:
    assert_same(run(masking, seeded(2), prompt), masked)


@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 draws one row of each request at a time")
def test_few_rows_are_drawn_at_once_and_the_results_are_the_same(
    masking: LLM, masked: dict[str, CompletionOutput], prompt: list[int]
) -> None:
    """As in V2's rejection sampler, the float32 copies of logits that drawing makes are bounded."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    sample, drawn_at_once = Sampler.sample, []

    def noting(self: Sampler, logits: torch.Tensor, *args: Any, **options: Any) -> Any:
        drawn_at_once.append(len(logits))
        return sample(self, logits, *args, **options)

    rows = 20
    with (
        patch.object(rejection_sampler, "MAX_CHUNK_BYTES", rows * VOCAB_SIZE * 4),
        patch.object(Sampler, "sample", noting),
    ):
        chunked = run(masking, seeded(3), prompt)
    assert rows / 2 < max(drawn_at_once) <= rows
    assert_same(chunked, masked)
