# SPDX-License-Identifier: Apache-2.0
"""On the CUDA worker a budget cuts drafts to lengths that only the device knows, and the text is stock vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from vllm import LLM, SamplingParams, envs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.spec_decode import adaptive_verification
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from tests.integration.engines import (
    Tree,
    engine,
    generate,
    generate_staggered,
    greedy,
    model_runner,
    spec_counters,
    texts,
)
from tests.integration.test_dynamic_trees import OPTIONS
from tests.rehearsal.test_cuda_worker import noise_between_steps
from tests.under_test import UNDER_TEST
from vllm_medusa.budget.pauses import Gains, Pauses
from vllm_medusa.runner.v2.budget import BudgetManager

pytestmark = pytest.mark.both_runners
MOST, TOKENS, NODES = 3, 9, 7
SIZES = [1, 8, 16]
"""Larger steps, of up to 24 rows, run eagerly, and so do those with prompts."""

Curve = list[tuple[int, float]]
SEVERAL: Curve = [(rows, 1 + 0.25 * rows) for rows in range(1, 65)]
"""With these a node pays that is more probable than not, roughly; how many there are differs from step to step."""
NOTHING_PAYS: Curve = [(rows, float(rows**2)) for rows in range(1, 65)]

TREES: dict[str, Tree] = {"dynamic": "dynamic"}
QUICK_START: dict[str, Any] = {}
if "triton" in UNDER_TEST.words:
    TREES = {"chain": "chain", "static": [3, 1]}
    # With the other attention, and in test_cuda_worker.py, engines measure memory and warm up.
    QUICK_START = {"kv_cache_memory_bytes": 1 << 26, "kernel_config": {"enable_jit_warmup": False}}

with_one_tree = pytest.mark.skipif("triton" in UNDER_TEST.words, reason="asks nothing of attention or a tree's shape")


@contextmanager
def fixed_costs(verification: Curve) -> Iterator[None]:
    """Let engines that start here take these costs for those that they measure."""
    measured = AdaptiveVerificationManager.set_initial_cost_curves

    def fixed(manager: AdaptiveVerificationManager, samples: Any) -> None:
        measured(manager, samples)
        manager.set_cost_curves([(1, 0.02)], verification)

    with ExitStack() as stack:
        stack.enter_context(patch.object(AdaptiveVerificationManager, "set_initial_cost_curves", fixed))
        stack.enter_context(patch.object(adaptive_verification, "_PROFILE_REPLAYS", 1))
        stack.enter_context(patch.object(envs, "VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN", 16))
        # Compiling it takes longer than all that it does here.
        eager = adaptive_verification._assign_draft_token_budget
        stack.enter_context(patch.object(adaptive_verification, "_assign_draft_token_budget_compiled", eager))
        yield


Batch = dict[str, int]
"""How many rows each request of a step has, by the request's id."""


@contextmanager
def rehearsed(target: Path, heads: Path, tree: Tree, budget: str | int, **options: Any) -> Iterator[LLM]:
    options = {
        "max_num_seqs": MOST,
        "max_num_batched_tokens": 32,
        "speculative_config": {"num_speculative_tokens": NODES, "medusa_budget": budget},
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES},
        **OPTIONS,
        **QUICK_START,
        **options,
    }
    with engine(target, heads=heads, tree=tree, **options) as llm:
        yield llm


@contextmanager
def batches(llm: LLM) -> Iterator[list[Batch]]:
    """Collect the steps to which the scheduler gives drafts."""
    runner, found = model_runner(llm), []
    prepare_inputs = runner.prepare_inputs

    def prepare(*args: Any) -> Any:
        batch = prepare_inputs(*args)
        if batch.num_draft_tokens_per_req is not None:
            requests = [req_id.rsplit("-", 1)[0] for req_id in batch.req_ids]
            found.append(dict(zip(requests, batch.cu_num_logits.diff().tolist(), strict=True)))
        return batch

    with patch.object(runner, "prepare_inputs", prepare):
        yield found


@dataclass(frozen=True)
class Plain:
    """What stock vLLM says."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    mixed: list[list[int]]


UNLIMITED = (0, 2)
"""Which of the mixed requests have no reason to verify less than a whole draft but the budget."""


def mixed() -> list[SamplingParams]:
    """Requests whose logits depend on their paths, that are limited, that follow a grammar or ask for another rule."""
    seeded = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "presence_penalty": 0.7}
    params = [seeded, {"medusa_max_nodes": 2}, {"medusa_acceptance": "typical"}, {"medusa_max_nodes": 0}]
    each = []
    for options in params:
        own = {name: value for name, value in options.items() if name.startswith("medusa")}
        others = {"temperature": 0.0} | {name: value for name, value in options.items() if name not in own}
        each.append(
            SamplingParams(max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=own or None, **others)
        )
    words = StructuredOutputsParams(regex=r"([^;]{2};){9}")
    return [*each, SamplingParams(temperature=0.0, max_tokens=TOKENS, structured_outputs=words, detokenize=True)]


@pytest.fixture(scope="module")
def plain(tiny_target: Path, held_out_prompts: list[list[int]]) -> Plain:
    prompts = [prompt[:10] for prompt in held_out_prompts[:5]]
    with engine(tiny_target, **OPTIONS) as llm:
        return Plain(prompts, texts(generate(llm, prompts, greedy(TOKENS))), texts(generate(llm, prompts, mixed())))


@pytest.fixture(scope="module", params=TREES.values(), ids=TREES)
def started(plain: Plain, tiny_target: Path, tiny_heads: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with fixed_costs(SEVERAL), rehearsed(tiny_target, tiny_heads, request.param, "auto") as llm:
        yield llm


@pytest.fixture
def llm(started: LLM) -> LLM:
    """The engine, as if it had not served yet."""
    manager = manager_of(started)
    manager._gains, manager._pauses, manager.most = Gains(), Pauses(), None
    manager._report = None  # It lets the tally begin anew when it is time.
    manager.set_cost_curves([(1, 0.02)], SEVERAL)
    return started


def manager_of(llm: LLM) -> BudgetManager:
    manager = model_runner(llm).adaptive_verification
    assert isinstance(manager, BudgetManager)
    return manager


def test_texts_are_plain_where_lengths_change_from_step_to_step_and_request_to_request(llm: LLM, plain: Plain) -> None:
    graphs = model_runner(llm).cudagraph_manager.graphs.values()
    before, replays = spec_counters(llm), sum(graph.replays for graph in graphs)
    manager_of(llm).tally.take()
    with noise_between_steps(llm), batches(llm) as steps:
        found = texts(generate_staggered(llm, plain.prompts, greedy(TOKENS), most=MOST))
    print("\nrows:", steps)
    assert found == plain.greedy
    assert (spec_counters(llm) - before).accepted > 0
    assert sum(graph.replays for graph in graphs) > replays
    assert any(len(set(step.values()) - {1}) > 1 for step in steps)
    assert len({sum(step.values()) for step in steps if len(step) == MOST}) > 1
    assert all(max(step.values()) <= NODES + 1 for step in steps)
    tally = manager_of(llm).tally
    assert tally.chosen == sum(sum(step.values()) - len(step) for step in steps)
    assert 0 < tally.chosen < tally.drafted
    assert 0 < tally.asked <= tally.steps


def test_requests_of_all_kinds_share_a_batch(llm: LLM, plain: Plain) -> None:
    with batches(llm) as steps:
        outputs = generate(llm, plain.prompts, mixed())
    assert texts(outputs) == plain.mixed
    unlimited = [outputs[index].request_id for index in UNLIMITED]
    num_nodes = model_runner(llm).speculator.proposer.tree.num_nodes
    assert any(1 < step.get(request, 0) <= num_nodes for step in steps for request in unlimited)


@with_one_tree
def test_what_was_accepted_of_late_is_learned(llm: LLM, plain: Plain) -> None:
    correction = model_runner(llm).speculator.correction
    correction.expected.zero_()
    correction.accepted.zero_()
    generate(llm, plain.prompts[:MOST], greedy(TOKENS))
    assert 0 < float(correction.accepted[1]) <= MOST * TOKENS
    assert 0 < float(correction.expected[1]) <= MOST * TOKENS


@with_one_tree
def test_where_nothing_pays_nothing_is_verified_and_heads_are_hardly_asked(llm: LLM, plain: Plain) -> None:
    manager = manager_of(llm)
    manager.set_cost_curves([(1, 0.02)], NOTHING_PAYS)
    asked: list[bool] = []
    asks_heads = manager.asks_heads

    def noted(num_reqs: int) -> bool:
        asked.append(asks_heads(num_reqs))
        return asked[-1]

    with patch.object(manager, "asks_heads", noted), batches(llm) as steps:
        [found] = texts(generate(llm, plain.prompts[:1], greedy(4 * TOKENS)))
    assert found[:TOKENS] == plain.greedy[0]
    assert {rows for step in steps for rows in step.values()} == {1}
    print("\nasked:", asked)
    assert 0 < sum(asked) < len(asked) / 2


@with_one_tree
def test_a_number_is_the_most_nodes_of_all_requests_in_a_step(llm: LLM, plain: Plain) -> None:
    most = MOST + 1
    manager_of(llm).most = most
    with batches(llm) as steps:
        found = texts(generate_staggered(llm, plain.prompts, greedy(TOKENS), most=MOST))
    assert found == plain.greedy
    nodes = [sum(step.values()) - len(step) for step in steps]
    assert max(nodes) == most
    assert any(len(set(step.values()) - {1}) > 1 for step in steps)
