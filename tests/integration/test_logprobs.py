# SPDX-License-Identifier: Apache-2.0
"""Whatever an engine reports of its draws, it reports with trees as stock vLLM does without speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm import CompletionOutput, SamplingParams

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


def seeded(seeds: int) -> dict[str, dict[str, Any]]:
    """The requests that have a sampling mask, once for each seed."""
    drawn = {name: each for name, each in REQUESTS.items() if "top_k" in each}
    return {f"{name} {seed}": {**each, "seed": seed} for name, each in drawn.items() for seed in range(seeds)}


def run(
    target: Path, requests: dict[str, dict[str, Any]], prompt: list[int], heads: Path | None = None, **options: Any
) -> dict[str, CompletionOutput]:
    """Run the requests together, those with penalties after the others."""
    common = {"max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    found = {}
    with engine(target, heads=heads, max_num_batched_tokens=4096, **options) as llm:
        for penalties in (False, True):
            batch = {name: each for name, each in requests.items() if ("penalties" in name) == penalties}
            outputs = generate(
                llm, [prompt] * len(batch), [SamplingParams(**each, **common) for each in batch.values()]
            )
            found.update({name: output.outputs[0] for name, output in zip(batch, outputs, strict=True)})
        assert heads is None or spec_counters(llm).accepted > len(requests)
    return found


def scores(completion: CompletionOutput) -> list[list[float]]:
    """For each token, its score and rank, then the scores of the best tokens, which may be tied."""
    assert completion.logprobs is not None
    return [
        [each[token].logprob, each[token].rank, *sorted((entry.logprob for entry in each.values()), reverse=True)]
        for token, each in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_of_every_mode_equal_those_without_speculation(
    mode: str, tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]]
) -> None:
    requests = REQUESTS | ({"token_ids": TOKEN_IDS} if UNDER_TEST.is_v2 else {})
    expected = run(tiny_target, requests, held_out_prompts[3], logprobs_mode=mode)
    found = run(tiny_target, requests, held_out_prompts[3], tiny_heads, logprobs_mode=mode)
    for name, before in expected.items():
        assert found[name].token_ids == before.token_ids, name
        for after_each, before_each in zip(scores(found[name]), scores(before), strict=True):
            assert after_each == pytest.approx(before_each, abs=1e-3), name
    if UNDER_TEST.is_v2:
        assert all(set(TOKEN_IDS["logprob_token_ids"]) <= set(each) for each in found["token_ids"].logprobs or ())


MASKED = {"logprobs_mode": "processed_logprobs", "return_sampling_mask": True}


@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="vLLM has sampling masks on V2 only")
def test_sampling_masks_equal_those_without_speculation(
    tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]]
) -> None:
    requests = seeded(2)
    expected = run(tiny_target, requests, held_out_prompts[3], **MASKED)
    found = run(tiny_target, requests, held_out_prompts[3], tiny_heads, **MASKED)
    for name, before in expected.items():
        assert found[name].token_ids == before.token_ids
        assert before.sampling_mask is not None
        assert found[name].sampling_mask == before.sampling_mask, name


@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 draws one row of each request at a time")
def test_few_rows_are_drawn_at_once_and_the_results_are_the_same(
    tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]]
) -> None:
    """As in V2's rejection sampler, the float32 copies of logits that drawing makes are bounded."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    requests = seeded(3)
    whole = run(tiny_target, requests, held_out_prompts[3], tiny_heads, **MASKED)

    sample, drawn_at_once = Sampler.sample, []

    def noting(self: Sampler, logits: torch.Tensor, *args: Any, **options: Any) -> Any:
        drawn_at_once.append(len(logits))
        return sample(self, logits, *args, **options)

    rows = 20
    with (
        patch.object(rejection_sampler, "MAX_CHUNK_BYTES", rows * VOCAB_SIZE * 4),
        patch.object(Sampler, "sample", noting),
    ):
        chunked = run(tiny_target, requests, held_out_prompts[3], tiny_heads, **MASKED)
    assert rows / 2 < max(drawn_at_once) <= rows
    for name, before in whole.items():
        assert chunked[name].token_ids == before.token_ids, name
        assert chunked[name].sampling_mask == before.sampling_mask, name
        for after_each, before_each in zip(scores(chunked[name]), scores(before), strict=True):
            assert after_each == pytest.approx(before_each, abs=1e-3), name
