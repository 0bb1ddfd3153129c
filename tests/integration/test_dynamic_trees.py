# SPDX-License-Identifier: Apache-2.0
"""Trees that each request's heads choose anew every step give stock vLLM's text, in fewer steps than one fixed tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import SchedulerOutput

from tests.integration.engines import (
    SpecCounters,
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
from vllm_medusa.structured_output.tokens import TreeTokens

PROMPTS, TOKENS, MOST = on(v1=(40, 56, 6), v2=(3, 9, 3), triton=(3, 7, 3))
NODES, LONGEST = on(v1=(15, 96), v2=(7, 10))
SEEDED = [
    SamplingParams(
        temperature=0.8,
        top_p=0.9,
        seed=index,
        max_tokens=TOKENS,
        ignore_eos=True,
        detokenize=False,
        presence_penalty=0.7 * (index % 2),
    )
    for index in range(on(v1=16, v2=2))
]
CODES = on(v1=4, v2=1)
CODE = SamplingParams(
    temperature=0,
    max_tokens=on(v1=24, v2=8),
    structured_outputs=StructuredOutputsParams(regex=r"([^;]{2};){9}"),
    detokenize=True,
)
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


class Plain:
    """What stock vLLM says."""

    def __init__(self, target: Path, prompts: list[list[int]]) -> None:
        self.prompts = [prompt[:LONGEST] for prompt in prompts[:PROMPTS]]
        with engine(target, max_num_seqs=64, **OPTIONS) as llm:
            self.greedy = texts(generate(llm, self.prompts, greedy(TOKENS)))
            self.seeded = texts(generate(llm, self.prompts[: len(SEEDED)], SEEDED))
            self.code = texts(generate(llm, self.prompts[:CODES], CODE))

    def is_said_by(self, llm: LLM) -> SpecCounters:
        """Assert that an engine says it too, in batches that mix; return what it counted with greedy requests."""
        assert texts(generate_staggered(llm, self.prompts, greedy(TOKENS), most=MOST)) == self.greedy
        counters = spec_counters(llm)
        assert texts(generate(llm, self.prompts[: len(SEEDED)], SEEDED)) == self.seeded
        both = [CODE, greedy(TOKENS)] * CODES
        mixed = texts(generate(llm, [self.prompts[index // 2] for index in range(2 * CODES)], both))
        assert mixed == [each for pair in zip(self.code, self.greedy, strict=False) for each in pair]
        return counters


@dataclass(frozen=True)
class CodeRun:
    """What requests with a grammar say beside free ones, and how.

    Attributes:
        texts: of both by turns, those with a grammar first.
        steps: how many a request with a grammar took, all together.
        drafts: of requests with a grammar.

    """

    texts: list[list[int]]
    steps: int
    drafts: list[TreeTokens]

    @classmethod
    def on(cls, llm: LLM, plain: Plain) -> CodeRun:
        both = [CODE, greedy(TOKENS)] * CODES
        with recorded_steps(llm) as steps:
            outputs = generate(llm, [plain.prompts[index // 2] for index in range(2 * CODES)], both)
        grammars = {output.request_id for output in outputs[::2]}
        taken = [req_id.rsplit("-", 1)[0] in grammars for step in steps for req_id in step.num_scheduled_tokens]
        drafts = [draft for step in steps for draft in step.scheduled_spec_decode_tokens.values()]
        return cls(texts(outputs), sum(taken), [draft for draft in drafts if isinstance(draft, TreeTokens)])


@contextmanager
def engine_with_trees(target: Path, heads: Path, tree: str, **speculative: Any) -> Iterator[LLM]:
    """One whose steps are too small for all prompts and drafts."""
    options: dict[str, Any] = {
        "speculative_config": {"num_speculative_tokens": NODES, **speculative},
        "max_num_batched_tokens": MOST * (NODES + 1) - NODES // 2,
    }
    with engine(target, heads=heads, tree=tree, **options, **OPTIONS) as llm:
        yield llm


class Run:
    """What an engine with trees says in batches that mix, and how."""

    def __init__(self, plain: Plain, target: Path, heads: Path, tree: str, **speculative: Any) -> None:
        with engine_with_trees(target, heads, tree, **speculative) as llm:
            with recorded_steps(llm) as steps:
                self.texts = texts(generate_staggered(llm, plain.prompts, greedy(TOKENS), most=MOST))
            self.counters: SpecCounters = spec_counters(llm)
            self.steps: list[SchedulerOutput] = steps
            self.seeded = texts(generate(llm, plain.prompts[: len(SEEDED)], SEEDED))
            self.code = CodeRun.on(llm, plain)
            self.remembered = len(model_runner(llm)._drafts) if not UNDER_TEST.is_v2 else 0

    @property
    def drafts(self) -> list[int]:
        """How many tokens were drafted, request by request and step by step."""
        return [len(draft) for step in self.steps for draft in step.scheduled_spec_decode_tokens.values()]


@pytest.fixture(scope="module")
def run(plain: Plain, tiny_target: Path, tiny_heads: Path) -> Run:
    return Run(plain, tiny_target, tiny_heads, "dynamic", medusa_min_probability=0.0)


@pytest.fixture(scope="module")
def probable(plain: Plain, tiny_target: Path, tiny_heads: Path) -> Run:
    return Run(plain, tiny_target, tiny_heads, "dynamic", medusa_min_probability=0.1)


@pytest.fixture(params=on(v1=["run", "probable"], v2=["run"]))
def either(request: pytest.FixtureRequest) -> Run:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Run)
    return found


@pytest.mark.both_runners
def test_greedy_tokens_equal_those_without_speculation(either: Run, plain: Plain) -> None:
    assert either.texts == plain.greedy
    assert either.counters.accepted > 0


@pytest.mark.both_runners
def test_seeded_requests_draw_what_they_draw_without_speculation(either: Run, plain: Plain) -> None:
    assert either.seeded == plain.seeded


@pytest.mark.both_runners
def test_requests_with_a_grammar_have_trees_beside_others(either: Run, plain: Plain) -> None:
    assert either.code.texts[::2] == plain.code
    assert either.code.texts[1::2] == plain.greedy[:CODES]
    assert any([*draft.parents[: len(draft)]] != [*range(len(draft))] for draft in either.code.drafts)


def test_requests_with_a_grammar_take_fewer_steps_with_a_tree_than_with_a_chain(
    run: Run, plain: Plain, tiny_target: Path, tiny_heads: Path
) -> None:
    with engine(tiny_target, heads=tiny_heads, tree="chain", **OPTIONS) as llm:
        chain = CodeRun.on(llm, plain)
    assert chain.texts == run.code.texts
    print("\nsteps with a grammar:", chain.steps, run.code.steps)
    assert run.code.steps < chain.steps


def test_the_batches_compared_mix_sizes_prompt_chunks_and_cut_drafts(run: Run) -> None:
    assert {len(step.num_scheduled_tokens) for step in run.steps} >= {1, MOST // 2, MOST}
    assert sum(map(is_mixed, run.steps)) >= 5
    assert max(run.drafts) == NODES > min(run.drafts)


def test_improbable_paths_are_not_drafted(probable: Run, run: Run) -> None:
    assert len(set(probable.drafts)) > 4
    assert sum(probable.drafts) / len(probable.drafts) < NODES / 2
    per_node, per_node_of_all = (each.counters.accepted / each.counters.drafted for each in (probable, run))
    assert per_node > 1.5 * per_node_of_all


def test_a_dynamic_tree_accepts_more_than_a_sparse_one_of_as_many_nodes(
    run: Run, plain: Plain, tiny_target: Path, tiny_heads: Path
) -> None:
    with engine_with_trees(tiny_target, tiny_heads, "sparse") as llm:
        assert texts(generate_staggered(llm, plain.prompts, greedy(TOKENS), most=MOST)) == plain.greedy
        sparse = spec_counters(llm)
    print("\nacceptance length:", sparse.acceptance_length, run.counters.acceptance_length)
    assert run.counters.acceptance_length > sparse.acceptance_length


def test_the_trees_of_requests_that_have_ended_are_forgotten(either: Run) -> None:
    assert either.remembered <= 2 * CODES


@pytest.mark.both_runners
@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 heeds it")
def test_a_least_probability_is_refused_where_every_tree_has_as_many_nodes(tiny_target: Path, tiny_heads: Path) -> None:
    options = {"speculative_config": {"medusa_min_probability": 0.2}}
    with (
        pytest.raises(ValueError, match=r"medusa_min_probability: 0\.2 cannot be heeded by vLLM's model runner V2"),
        engine(tiny_target, heads=tiny_heads, tree="dynamic", **options),
    ):
        pass
