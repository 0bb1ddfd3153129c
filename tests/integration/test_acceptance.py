# SPDX-License-Identifier: Apache-2.0
"""Requests that choose their acceptance rule and the size of their drafts, alone and in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.integration.engines import SpecCounters, engine, generate, spec_counters
from tests.under_test import UNDER_TEST, on

pytestmark = pytest.mark.both_runners

TOKENS = on(v1=32, v2=6)
PENALTIES = {"frequency_penalty": 0.8, "repetition_penalty": 1.3}


def params(temperature: float = 0.9, medusa: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
    seed = 7 if temperature else None
    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args=medusa,
        **options,
    )


TYPICAL = {"medusa_acceptance": "typical"}
REQUESTS = {
    "exact": params(),
    "typical": params(medusa=TYPICAL, logprobs=1),
    "typical with penalties": params(medusa=TYPICAL, **PENALTIES, top_p=0.9),
    "greedy": params(temperature=0.0),
    "greedy typical": params(temperature=0.0, medusa=TYPICAL),
    "no speculation": params(medusa={"medusa_max_nodes": 0}),
    "two nodes": params(medusa={"medusa_max_nodes": 2}),
}
ALONE = on(v1=list(REQUESTS), v2=["exact", "typical", "typical with penalties", "no speculation"])
"""Requests that run alone too: an interpreted engine takes seconds for each."""


@dataclass(frozen=True)
class Run:
    """What requests emitted alone and with all others, and what their speculation counted alone."""

    alone: dict[str, RequestOutput]
    counters: dict[str, SpecCounters]
    together: dict[str, RequestOutput]

    def tokens(self, name: str) -> list[int]:
        return list(self.together[name].outputs[0].token_ids)


@pytest.fixture(scope="module")
def llm(tiny_target: Path, tiny_heads: Path) -> Iterator[LLM]:
    with engine(tiny_target, heads=tiny_heads, tree=[3, 2, 1]) as llm:
        yield llm


@pytest.fixture(scope="module")
def run(llm: LLM, held_out_prompts: list[list[int]]) -> Run:
    prompt = held_out_prompts[-3]
    alone, counters = {}, {}
    for name in ALONE:
        before = spec_counters(llm)
        [alone[name]] = generate(llm, [prompt], REQUESTS[name])
        counters[name] = spec_counters(llm) - before
    together = generate(llm, [prompt] * len(REQUESTS), list(REQUESTS.values()))
    return Run(alone, counters, dict(zip(REQUESTS, together, strict=True)))


@pytest.mark.parametrize("name", ALONE)
def test_a_request_emits_alone_what_it_emits_among_requests_of_every_kind(run: Run, name: str) -> None:
    assert list(run.alone[name].outputs[0].token_ids) == run.tokens(name)


def test_typical_acceptance_keeps_more_tokens_than_exact_and_other_ones(run: Run) -> None:
    assert run.counters["typical"].acceptance_length > run.counters["exact"].acceptance_length
    assert run.tokens("typical") != run.tokens("exact")
    assert run.tokens("typical with penalties") != run.tokens("typical")


def test_at_temperature_0_typical_acceptance_is_exact(run: Run) -> None:
    assert run.tokens("greedy typical") == run.tokens("greedy")
    if not UNDER_TEST.is_v2:
        assert run.counters["greedy typical"] == run.counters["greedy"]


def test_smaller_drafts_and_none_leave_the_text_and_accept_less(run: Run) -> None:
    assert run.tokens("no speculation") == run.tokens("two nodes") == run.tokens("exact")
    assert run.counters["no speculation"].accepted == 0
    if not UNDER_TEST.is_v2:  # whose scheduler counts the tree's rows for every request
        assert run.counters["no speculation"].drafted == 0
        assert run.counters["two nodes"].drafted <= 2 * run.counters["two nodes"].drafts


def test_every_token_that_typical_acceptance_emits_has_its_own_logprob(llm: LLM, run: Run) -> None:
    output = run.together["typical"]
    emitted = output.outputs[0]
    assert len(emitted.logprobs) == len(emitted.token_ids) == TOKENS
    text = [*output.prompt_token_ids, *emitted.token_ids]
    [scored] = generate(llm, [text], SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False))
    expected = scored.prompt_logprobs[-TOKENS:]
    for token, found, true in zip(emitted.token_ids, emitted.logprobs, expected, strict=True):
        assert found[token].logprob == pytest.approx(true[token].logprob, abs=1e-4)


@pytest.mark.parametrize("medusa", [{"medusa_acceptance": "eager"}, {"medusa_max_nodes": -1}, {"medusa_nodes": 3}])
def test_a_wrong_option_is_refused_with_its_name_and_the_engine_goes_on(
    llm: LLM, run: Run, held_out_prompts: list[list[int]], medusa: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(medusa))):
        generate(llm, [held_out_prompts[-3]], params(medusa=medusa))
    if not UNDER_TEST.is_v2:
        [output] = generate(llm, [held_out_prompts[-3]], REQUESTS["exact"])
        assert list(output.outputs[0].token_ids) == run.tokens("exact")
