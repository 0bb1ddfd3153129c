# SPDX-License-Identifier: Apache-2.0
"""Seeded requests emit with trees what they emit in stock vLLM without speculation, whatever their parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tests.integration.engines import (
    SpecCounters,
    engine,
    generate,
    generate_staggered,
    model_runner,
    recorded_steps,
    spec_counters,
)
from tests.under_test import UNDER_TEST, on
from vllm_medusa.tree.best_first import IndependentHeads, best_first

TOKENS, MOST, NODES, PROMPTS = on(v1=(48, 16, 31, 4), v2=(16, 11, 9, 1))
COMMON = list(range(3, on(v1=300, v2=130)))
"""Tokens that the target emits often: a byte-level vocabulary starts with single characters, then frequent pairs.

V2 takes at most 128 stop tokens of a request."""


class NoRecentTokens(LogitsProcessor):
    """Forbids the last tokens of the output to requests that ask for it with ``extra_args={"no_recent": count}``."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[int, list[int]]] = {}
        self._forbidden: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def asked(params: SamplingParams, _: object, output: list[int]) -> tuple[int, list[int]] | None:
            count = (params.extra_args or {}).get("no_recent")
            return (count, output) if count else None

        process_dict_updates(self._requests, batch_update, asked)
        self._forbidden = {index: output[-count:] for index, (count, output) in self._requests.items()}

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, tokens in self._forbidden.items():
            logits[index, tokens] = float("-inf")
        return logits


SAMPLED = {"temperature": 0.8, "top_p": 0.9}
PENALTIES = {"frequency_penalty": 0.8, "presence_penalty": 0.6, "repetition_penalty": 1.3}

CASES: dict[str, dict[str, Any]] = {
    "seed": SAMPLED,
    "hot": {"temperature": 1.3},
    "frequency_penalty": {**SAMPLED, "frequency_penalty": 0.8},
    "presence_penalty": {**SAMPLED, "presence_penalty": 0.8},
    "repetition_penalty": {**SAMPLED, "repetition_penalty": 1.3},
    "penalties": {**SAMPLED, **PENALTIES},
    "min_p": {**SAMPLED, "min_p": 0.1},
    "top_k": {**SAMPLED, "top_k": 5},
    "logit_bias": {**SAMPLED, "logit_bias": dict.fromkeys(COMMON, -1.5)},
    "bad_words": {**SAMPLED, "bad_words": ["self", "return", "the", "in", "==", "a b", "def __init__", "= None"]},
    "stop_token_ids": {**SAMPLED, "stop_token_ids": COMMON[::4]},
    "stop": {**SAMPLED, "stop": ["self", "\n\n", "in"]},
    "min_tokens": {**SAMPLED, "stop_token_ids": COMMON, "min_tokens": 20},
    "greedy_min_tokens": {"temperature": 0.0, "stop_token_ids": COMMON, "min_tokens": on(v1=25, v2=12)},
    "allowed_token_ids": {**SAMPLED, "allowed_token_ids": COMMON},
    "no_recent": {**SAMPLED, "extra_args": {"no_recent": 12}},
    "everything": {
        **SAMPLED,
        **PENALTIES,
        "min_p": 0.02,
        "top_k": 40,
        "logit_bias": {COMMON[0]: 1.0},
        "bad_words": ["self"],
        "stop_token_ids": COMMON[::40],
        "min_tokens": 30,
        "allowed_token_ids": COMMON,
        "extra_args": {"no_recent": 2},
    },
    "n": {**SAMPLED, "n": 3},
    "logprobs": {**SAMPLED, "logprobs": 5},
    "greedy": {"temperature": 0.0},
    "greedy_penalties": {"temperature": 0.0, **PENALTIES},
    "greedy_no_recent": {"temperature": 0.0, "extra_args": {"no_recent": 12}},
    "greedy_logprobs": {"temperature": 0.0, "logprobs": 5},
}
"""Parameters by name; every prompt runs with each of them, all in the same batches, next to unseeded requests."""
if UNDER_TEST.is_v2:  # which has no place for a processor of one's own
    kept = (
        "seed penalties min_p logit_bias bad_words stop_token_ids greedy_min_tokens allowed_token_ids logprobs greedy"
    )
    CASES = {name: CASES[name] for name in kept.split()}


@dataclass(frozen=True)
class Run:
    """What one engine emitted and how."""

    completions: dict[str, list[CompletionOutput]]
    counters: SpecCounters
    steps: list[SchedulerOutput]


def requests(prompts: Sequence[list[int]]) -> Iterator[tuple[str, list[int], SamplingParams]]:
    for index, prompt in enumerate(prompts):
        for name, options in CASES.items():
            seed = {"seed": 1000 + index} if options["temperature"] else {}
            yield name, prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True, **{**options, **seed})
        yield "unseeded", prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.0)


def collect(names: Sequence[str], outputs: Sequence[RequestOutput]) -> dict[str, list[CompletionOutput]]:
    completions: dict[str, list[CompletionOutput]] = {}
    for name, output in zip(names, outputs, strict=True):
        completions.setdefault(name, []).extend(output.outputs)
    return completions


@pytest.fixture(scope="module")
def tree(tiny_heads: Path) -> list[list[int]]:
    accuracies = json.loads((tiny_heads / "config.json").read_text())["medusa_accuracies"]
    return best_first(IndependentHeads(torch.tensor(accuracies)), NODES).choices


@pytest.fixture(scope="module")
def prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[-PROMPTS:]


ENGINE: dict[str, Any] = {"skip_tokenizer_init": False, "logits_processors": on(v1=[NoRecentTokens], v2=[])}


@pytest.fixture(scope="module")
def plain(tiny_target: Path, prompts: list[list[int]]) -> dict[str, list[CompletionOutput]]:
    """Stock vLLM, with a budget that never cuts a prompt, since it cannot seed a cut one on CPUs."""
    names, inputs, params = zip(*requests(prompts), strict=True)
    with engine(tiny_target, max_num_batched_tokens=4096, **ENGINE) as llm:
        return collect(names, generate(llm, inputs, params))


@pytest.fixture(scope="module")
def medusa(tiny_target: Path, tiny_heads: Path, tree: list[list[int]], prompts: list[list[int]]) -> Run:
    names, inputs, params = zip(*requests(prompts), strict=True)
    budget = MOST * (NODES + 1) - NODES // 2
    with (
        engine(tiny_target, heads=tiny_heads, tree=tree, max_num_batched_tokens=budget, **ENGINE) as llm,
        recorded_steps(llm) as steps,
    ):
        outputs = generate_staggered(llm, inputs, params, most=MOST)
        return Run(collect(names, outputs), spec_counters(llm), list(steps))


@pytest.mark.both_runners
@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_without_speculation(
    name: str, plain: dict[str, list[CompletionOutput]], medusa: Run
) -> None:
    expected, found = plain[name], medusa.completions[name]
    assert [list(completion.token_ids) for completion in found] == [
        list(completion.token_ids) for completion in expected
    ]
    assert [completion.text for completion in found] == [completion.text for completion in expected]
    reasons = [(completion.finish_reason, completion.stop_reason) for completion in expected]
    assert [(completion.finish_reason, completion.stop_reason) for completion in found] == reasons


@pytest.mark.both_runners
@pytest.mark.parametrize("name", [name for name in CASES if "logprobs" in CASES[name]])
def test_logprobs_and_ranks_equal_those_without_speculation(
    name: str, plain: dict[str, list[CompletionOutput]], medusa: Run
) -> None:
    for expected, found in zip(plain[name], medusa.completions[name], strict=True):
        assert len(found.logprobs) == len(found.token_ids) == TOKENS
        for token, before, after in zip(found.token_ids, expected.logprobs, found.logprobs, strict=True):
            assert after[token].logprob == pytest.approx(before[token].logprob, abs=1e-4)
            # Far down the list neighbours are closer than the rounding of a float32.
            assert abs(after[token].rank - before[token].rank) <= before[token].rank // 100
            best = [sorted((entry.logprob for entry in entries.values()), reverse=True) for entries in (before, after)]
            assert best[1] == pytest.approx(best[0], abs=1e-4)


def test_the_parameters_compared_change_the_text(plain: dict[str, list[CompletionOutput]]) -> None:
    def emitted(name: str) -> list[list[int]]:
        return [list(completion.token_ids) for completion in plain[name]]

    base = {"min_tokens": "stop_token_ids", **dict.fromkeys(["n", "logprobs", "seed", "greedy", "greedy_logprobs"])}
    for name in CASES:
        reference = base.get(name, "greedy" if name.startswith("greedy") else "seed")
        if reference is not None:
            assert emitted(name) != emitted(reference), name
    assert min(map(len, emitted("stop_token_ids"))) < 20 <= min(map(len, emitted("min_tokens")))


@pytest.mark.both_runners
def test_the_batches_compared_accept_drafts(medusa: Run) -> None:
    print("\nacceptance length:", medusa.counters.acceptance_length)
    assert medusa.counters.acceptance_length > 1.2


def test_the_batches_compared_cut_seeded_prompts(medusa: Run) -> None:
    cut = [
        request
        for step in medusa.steps
        for request in step.scheduled_new_reqs
        if step.scheduled_spec_decode_tokens
        and request.num_computed_tokens + step.num_scheduled_tokens[request.req_id] < len(request.prompt_token_ids)
        and request.sampling_params.seed is not None
    ]
    assert len(cut) >= 3


def generator_states(llm: LLM, prompts: Sequence[list[int]]) -> dict[tuple[str, int], torch.Tensor]:
    """Decode seeded requests together and note each one's generator whenever it has emitted so many tokens."""
    for index, prompt in enumerate(prompts):
        params = SamplingParams(**SAMPLED, seed=index, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    states: dict[tuple[str, int], torch.Tensor] = {}
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        batch = model_runner(llm).input_batch
        for output in outputs:
            if not output.finished:
                [row] = [row for name, row in batch.req_id_to_index.items() if name.split("-")[0] == output.request_id]
                states[output.request_id, len(output.outputs[0].token_ids)] = batch.generators[row].get_state()
    return states


def test_after_each_step_a_generator_is_where_as_many_tokens_leave_it_without_speculation(
    tiny_target: Path, tiny_heads: Path, tree: list[list[int]], held_out_prompts: list[list[int]]
) -> None:
    """So a request has drawn once for each token, and not again while others of its batch walked on."""
    with engine(tiny_target, max_num_batched_tokens=4096) as llm:
        expected = generator_states(llm, held_out_prompts[:MOST])
    with engine(tiny_target, heads=tiny_heads, tree=tree, max_num_batched_tokens=4096) as llm:
        found = generator_states(llm, held_out_prompts[:MOST])
        assert spec_counters(llm).accepted > 50
    assert found
    assert all(torch.equal(state, expected[key]) for key, state in found.items())
