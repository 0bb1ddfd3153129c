# SPDX-License-Identifier: Apache-2.0
"""Drafts that a budget cuts, differently in each step, give stock vLLM's text; where none pays there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams

from tests.integration.engines import engine, generate, greedy, model_runner, recorded_steps, spec_counters, texts
from tests.integration.test_dynamic_trees import CODES, MOST, Plain, Run
from tests.under_test import UNDER_TEST
from vllm_medusa.budget.budget import Budget
from vllm_medusa.budget.cost import Curve
from vllm_medusa.budget.pauses import LONGEST_PAUSE
from vllm_medusa.budget.store import Costs
from vllm_medusa.model.paths import PathHeads
from vllm_medusa.runner.v1 import costs as measuring
from vllm_medusa.runner.v1 import model_runner as serving
from vllm_medusa.tree.levels import Asked
from vllm_medusa.tree.options import DYNAMIC_BEAM

on_v1 = pytest.mark.skipif(UNDER_TEST.is_v2, reason="on V2 drafts are as long as the tree")

SEVERAL = Costs(
    verification=Curve(sizes=(1, 8, 64), seconds=(1.0, 1.3, 6.0)), proposal=Curve(sizes=(1, 16), seconds=(0.02, 0.03))
)
"""With these, one request verifies several nodes, and each of many verifies few."""

NOTHING_PAYS = Costs(verification=Curve(sizes=(1, 64), seconds=(1.0, 64.0)), proposal=SEVERAL.proposal)


@contextmanager
def fixed_costs(costs: Costs) -> Iterator[None]:
    """Let engines that start here take these costs, whatever the clock says while they serve."""
    with (
        patch.object(serving, "known_costs", lambda *_: costs),
        patch.object(Budget, "step_took"),
        patch.object(Budget, "proposal_took"),
    ):
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measuring, "envs", SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path)))
    return tmp_path


@pytest.fixture(scope="module")
def decode(plain: Plain, tiny_target: Path, tiny_heads: Path) -> Callable[..., Run]:
    def run(tree: Any, budget: str | int) -> Run:
        return Run(plain, tiny_target, tiny_heads, tree, medusa_budget=budget)

    return run


def prediction_counters() -> list[float]:
    """Verified nodes, how many were expected to be accepted, how many were."""
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    names = [f"medusa:predicted_nodes{what}_total" for what in ("", "_expected", "_accepted")]
    return [sum(sample.value for sample in samples if sample.name == name) for name in names]


def assert_texts_are_plain(run: Run, plain: Plain) -> None:
    assert run.texts == plain.greedy
    assert run.seeded == plain.seeded
    assert run.code.texts[::2] == plain.code
    assert run.code.texts[1::2] == plain.greedy[:CODES]


@pytest.fixture(scope="module", params=["dynamic", [3, 2, 1]], ids=["dynamic", "static"])
def cut(decode: Callable[..., Run], request: pytest.FixtureRequest) -> Run:
    """What an engine says whose budget cuts drafts to several nodes."""
    with fixed_costs(SEVERAL):
        return decode(request.param, "auto")


@on_v1
def test_texts_are_plain_where_lengths_change_from_step_to_step(cut: Run, plain: Plain) -> None:
    assert_texts_are_plain(cut, plain)
    lengths = {len(draft) for step in cut.steps for draft in step.scheduled_spec_decode_tokens.values()}
    assert len(lengths) > 2
    drafted = [
        sum(map(len, step.scheduled_spec_decode_tokens.values())) / len(step.num_scheduled_tokens)
        for most in (range(1, 2), range(MOST - 1, MOST + 1))
        for step in cut.steps
        if len(step.num_scheduled_tokens) in most and step.scheduled_spec_decode_tokens
    ]
    assert len(set(drafted)) > 5
    assert cut.counters.accepted > 0


@on_v1
def test_a_request_alone_verifies_more_nodes_than_each_of_many(cut: Run) -> None:
    def nodes_each(requests: int) -> float:
        drafts = [
            len(step.scheduled_spec_decode_tokens.get(each, []))
            for step in cut.steps
            if len(step.num_scheduled_tokens) == requests and not step.scheduled_new_reqs
            for each in step.num_scheduled_tokens
        ]
        return sum(drafts) / len(drafts)

    print("\nnodes of a request, alone and among most:", nodes_each(1), nodes_each(MOST))
    assert nodes_each(1) > 1.3 * nodes_each(MOST) > 0


@on_v1
def test_texts_are_plain_where_sequential_heads_are_not_asked_for_all_levels_and_nodes(
    plain: Plain, tiny_target: Path, tiny_sequential_heads: Path
) -> None:
    asked: list[tuple[bool, int]] = []
    ask = PathHeads.top_predictions

    def noting(heads: PathHeads, nodes: Asked, top_k: int) -> Any:
        asked.append((nodes.parents is None, nodes.tokens.shape[1]))
        return ask(heads, nodes, top_k)

    with fixed_costs(SEVERAL), patch.object(PathHeads, "top_predictions", noting):
        run = Run(plain, tiny_target, tiny_sequential_heads, "dynamic", medusa_budget="auto")
    assert_texts_are_plain(run, plain)
    assert run.counters.accepted > 0
    proposals = sum(first for first, _ in asked)
    print("\nlevels of a proposal:", len(asked) / proposals)
    assert proposals < len(asked) < 4 * proposals
    assert {1, DYNAMIC_BEAM} < {nodes for first, nodes in asked if not first}


@on_v1
@pytest.mark.parametrize("tree", ["dynamic", [3, 2, 1]], ids=["dynamic", "static"])
def test_texts_are_plain_with_costs_that_the_engine_measures(
    tree: Any, plain: Plain, decode: Callable[..., Run], cache: Path
) -> None:
    assert_texts_are_plain(decode(tree, "auto"), plain)
    [file] = (cache / "medusa" / "costs").iterdir()
    assert Costs.read(file) is not None


@on_v1
def test_where_nothing_pays_nothing_is_drafted_and_heads_are_hardly_asked(
    plain: Plain, tiny_target: Path, tiny_heads: Path
) -> None:
    asked = 0
    with (
        fixed_costs(NOTHING_PAYS),
        engine(tiny_target, heads=tiny_heads, tree="dynamic", speculative_config={"medusa_budget": "auto"}) as llm,
        recorded_steps(llm) as steps,
    ):
        drafter = model_runner(llm).drafter
        propose = drafter.propose

        def counted(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            return propose(*arguments)

        drafter.propose = counted
        tokens = 6 * LONGEST_PAUSE
        found = texts(generate(llm, plain.prompts[:4], greedy(tokens)))
        assert spec_counters(llm).drafted == 0
    with engine(tiny_target) as llm:
        assert texts(generate(llm, plain.prompts[:4], greedy(tokens))) == found
    assert not any(step.scheduled_spec_decode_tokens for step in steps)
    assert 0 < asked < len(steps) / 20


@on_v1
def test_a_number_is_the_most_nodes_of_all_requests_in_a_step(plain: Plain, decode: Callable[..., Run]) -> None:
    most = 2 * MOST + 1
    run = decode("dynamic", most)
    assert_texts_are_plain(run, plain)
    drafted = [sum(map(len, step.scheduled_spec_decode_tokens.values())) for step in run.steps]
    assert max(drafted) == most
    assert len(set(run.drafts)) > 4


@on_v1
def test_limits_of_requests_hold_and_prometheus_counts_what_was_expected_of_all_verified_nodes(
    plain: Plain, tiny_target: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1e-9")
    before = prediction_counters()
    limits = [0, 1, 3]
    params = [
        SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, extra_args={"medusa_max_nodes": limit}
        )
        for limit in limits
    ]
    with (
        fixed_costs(SEVERAL),
        engine(tiny_target, heads=tiny_heads, tree="dynamic", speculative_config={"medusa_budget": "auto"}) as llm,
        recorded_steps(llm) as steps,
    ):
        emitted = texts(generate(llm, plain.prompts[:3], params))
        counted = spec_counters(llm)
    nodes, expected, accepted = (now - old for now, old in zip(prediction_counters(), before, strict=True))
    assert (nodes, accepted) == (counted.drafted, counted.accepted)
    assert accepted / 2 < expected < accepted * 2
    assert emitted == [text[:24] for text in plain.greedy[:3]]
    longest: dict[str, int] = {}
    for step in steps:
        for each, draft in step.scheduled_spec_decode_tokens.items():
            longest[each] = max(longest.get(each, 0), len(draft))
    assert sorted(longest.values()) in ([1, 2], [1, 3])


@on_v1
def test_costs_are_measured_once_and_again_where_the_file_is_broken(
    tiny_target: Path, tiny_heads: Path, cache: Path
) -> None:
    def start() -> Costs:
        with engine(tiny_target, heads=tiny_heads, tree="chain", speculative_config={"medusa_budget": "auto"}):
            [file] = (cache / "medusa" / "costs").iterdir()
            found = Costs.read(file)
            assert found is not None
            return found

    first = start()
    assert first.verification.sizes[0] == 1
    assert start() == first
    [file] = (cache / "medusa" / "costs").iterdir()
    file.write_text(file.read_text()[:-20])
    assert start() != first


@pytest.mark.both_runners
@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 heeds it")
def test_a_number_is_refused_where_decode_steps_are_no_graphs(tiny_target: Path, tiny_heads: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"medusa_budget: 8 cannot be heeded .* whole decode steps are no CUDA graphs"),
        engine(tiny_target, heads=tiny_heads, tree="dynamic", speculative_config={"medusa_budget": 8}),
    ):
        pass
