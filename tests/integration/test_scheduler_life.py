# SPDX-License-Identifier: Apache-2.0
"""A request's life in the scheduler: whatever happens to it while trees are verified, its text is stock vLLM's."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.core.sched.output import SchedulerOutput

from tests.integration.engines import (
    Prompt,
    engine,
    generate,
    generate_staggered,
    greedy,
    is_mixed,
    recorded_steps,
    spec_counters,
    texts,
)
from tests.under_test import on
from vllm_medusa.structured_output.tokens import TreeTokens

ENDINGS = on(v1=["stop tokens", "stop strings", "end of sequence", "min tokens"], v2=["stop tokens"])
PROMPTS, LENGTH, REST, LATE, GRAMMAR = on(v1=(24, 96, 24, 48, 48), v2=(8, 40, 8, 24, 24))
TREE = on(v1=[3, 2, 1, 1], v2=[2, 2, 1])
NODES = on(v1=3 + 6 + 6 + 6, v2=2 + 4 + 4)
BLOCK_SIZE = 32
MAX_LENGTH = 192
MOST = 6
PATIENCE = 120
"""Seconds after which an engine that a failed test has left broken is given up."""
OPTIONS: dict[str, Any] = {
    "max_model_len": MAX_LENGTH,
    "max_num_seqs": MOST,
    "max_num_batched_tokens": 256,
    "block_size": BLOCK_SIZE,
    "enable_prefix_caching": True,
    "skip_tokenizer_init": False,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
COLOURS = ["red", "green", "blue", "crimson"]
CODE, SEGMENTS = r"[a-f]{3,9}-[0-9]{2}", r"([^;]{2};){9}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["self", "other"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Scenario:
    """Requests, and what stock vLLM answers."""

    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]
    answers: list[RequestOutput] = field(default_factory=list)

    @classmethod
    def run_on(cls, llm: LLM, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> Scenario:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        return cls(prompts, each, generate(llm, prompts, each))

    def repeat_on(self, llm: LLM) -> list[RequestOutput]:
        return generate(llm, self.prompts, self.params)


@dataclass(frozen=True)
class Plain:
    """What stock vLLM says."""

    prompts: list[list[int]]
    long: list[list[int]]
    scenarios: dict[str, Scenario]


def outcome(outputs: Sequence[RequestOutput]) -> list[tuple[Any, ...]]:
    """Return all that a user sees of the completions."""
    return [
        (list(completion.token_ids), completion.text, completion.finish_reason, completion.stop_reason)
        for output in outputs
        for completion in output.outputs
    ]


def late_token(text: list[int]) -> int:
    """Return the token of the first ``LATE`` that comes up latest."""
    return max(text[:LATE], key=text.index)


@pytest.fixture(scope="module")
def target(tiny_target: Path, held_out_prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tiny target; its tokenizer ends a text at the token that its prompts hold most often."""
    directory = tmp_path_factory.mktemp("life") / "target"
    shutil.copytree(tiny_target, directory)
    common = Counter(chain.from_iterable(held_out_prompts)).most_common(1)[0][0]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(common)
    assert tokenizer.eos_token_id == common
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plain(target: Path, held_out_prompts: list[list[int]]) -> Plain:
    """Run every scenario on stock vLLM."""
    prompts = held_out_prompts[:PROMPTS]
    # A wider batch takes fewer steps, each of which an interpreted engine pays for.
    with engine(target, **OPTIONS | {"max_num_seqs": on(v1=MOST, v2=PROMPTS)}) as llm:
        long = texts(generate(llm, prompts, greedy(LENGTH)))
        tokenizer = llm.get_tokenizer()
        stop_tokens = [late_token(text) for text in long]
        # From the middle of one token to the middle of the one after the next, where tokens are long enough.
        decoded = [tokenizer.decode(text) for text in long]
        stop_strings = [text[20 + index : 24 + index] for index, text in enumerate(decoded)]
        seeded = [
            SamplingParams(temperature=0.8, top_p=0.9, seed=index, max_tokens=80, ignore_eos=True)
            for index in range(12)
        ]
        grammars = [
            StructuredOutputsParams(choice=COLOURS),
            StructuredOutputsParams(regex=CODE),
            StructuredOutputsParams(json=SCHEMA),
            StructuredOutputsParams(regex=SEGMENTS),  # Drafts are seldom valid under the others.
        ]
        structured = [
            SamplingParams(temperature=0, max_tokens=GRAMMAR, structured_outputs=grammars[index % 4])
            for index in range(12)
        ]
        requests: dict[str, tuple[Sequence[Prompt], SamplingParams | Sequence[SamplingParams]]] = {
            "stop tokens": (
                prompts,
                [
                    SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop_token_ids=[token])
                    for token in stop_tokens
                ],
            ),
            "stop strings": (
                prompts,
                [
                    SamplingParams(
                        temperature=0,
                        max_tokens=64,
                        ignore_eos=True,
                        stop=["not in any text", stop],
                        include_stop_str_in_output=bool(index % 2),
                    )
                    for index, stop in enumerate(stop_strings)
                ],
            ),
            "end of sequence": (prompts, SamplingParams(temperature=0, max_tokens=64)),
            "min tokens": (prompts[:12], SamplingParams(temperature=0, max_tokens=64, min_tokens=9)),
            "seeded": (prompts[:12], seeded),
            "several completions": (
                prompts[:4],
                SamplingParams(n=3, temperature=0.9, seed=11, max_tokens=32, ignore_eos=True),
            ),
            "prompt logprobs": (
                prompts[:8],
                [SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=index % 3) for index in range(8)],
            ),
            "one-token prompts": ([[prompt[0]] for prompt in prompts[:12]], greedy(32)),
            "to the model's length": (prompts[:8], greedy(MAX_LENGTH)),
            "with a grammar": (
                prompts,
                list(chain.from_iterable((grammar, greedy(GRAMMAR - 8)) for grammar in structured[: PROMPTS // 2])),
            ),
        }
        names = on(v1=set(requests), v2={*ENDINGS, "with a grammar"})
        scenarios = {name: Scenario.run_on(llm, *requests[name]) for name in requests if name in names}
    return Plain(prompts, long, scenarios)


@contextmanager
def recorded_emissions(llm: LLM) -> Iterator[dict[str, list[int]]]:
    """Collect the tokens that the model runner emits for each request, those that the scheduler cuts off included."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    emitted: dict[str, list[int]] = {}
    original = scheduler.update_from_output

    def update_from_output(scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        for req_id, index in model_runner_output.req_id_to_index.items():
            emitted.setdefault(req_id, []).extend(model_runner_output.sampled_token_ids[index])
        return original(scheduler_output, model_runner_output)

    scheduler.update_from_output = update_from_output
    try:
        yield emitted
    finally:
        del scheduler.update_from_output


def cut_off(emitted: dict[str, list[int]], outputs: Sequence[RequestOutput]) -> int:
    """Count the requests of one completion that ended before the last token of an accepted branch."""
    of_request = {req_id.rsplit("-", 1)[0]: tokens for req_id, tokens in emitted.items()}
    cut = 0
    for output in outputs:
        kept, tokens = list(output.outputs[0].token_ids), of_request[output.request_id]
        assert tokens[: len(kept)] == kept
        cut += len(tokens) > len(kept)
    return cut


def preemptions(llm: LLM) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def resumptions(steps: Sequence[SchedulerOutput]) -> int:
    """Count requests that go on after a preemption: V1's runner is told their names, V2's gets them anew."""
    sent = Counter(request.req_id for step in steps for request in step.scheduled_new_reqs)
    return sum(len(step.scheduled_cached_reqs.resumed_req_ids) for step in steps) + sent.total() - len(sent)


def padded(steps: Sequence[SchedulerOutput]) -> int:
    """Count the drafts that the scheduler has made up for a request that had none."""
    return sum(-1 in draft for step in steps for draft in step.scheduled_spec_decode_tokens.values())


def join(
    llm: LLM, first: tuple[str, Prompt, SamplingParams], second: tuple[str, Prompt, SamplingParams]
) -> dict[str, RequestOutput]:
    """Run two requests, the second from when the first has emitted something."""
    outputs: dict[str, RequestOutput] = {}
    waiting = [first, second]
    deadline = monotonic() + PATIENCE
    while waiting or llm.llm_engine.has_unfinished_requests():
        assert monotonic() < deadline, "the engine does not finish its requests"
        if len(waiting) == 2 or (waiting and outputs):
            name, prompt, params = waiting.pop(0)
            params = params.clone()
            params.output_kind = RequestOutputKind.CUMULATIVE  # ``LLM.generate`` has asked for the final output only.
            llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        outputs |= {output.request_id: output for output in llm.llm_engine.step()}
    return outputs


class TestRoomForAll:
    """A cache that holds every request."""

    @pytest.fixture(scope="class")
    def llm(self, plain: Plain, target: Path, tiny_heads: Path) -> Iterator[LLM]:
        with engine(target, heads=tiny_heads, tree=TREE, **OPTIONS) as llm:
            yield llm

    @pytest.mark.both_runners
    def test_more_requests_than_fit_at_once_wait_and_give_the_stock_text(self, llm: LLM, plain: Plain) -> None:
        before = spec_counters(llm)
        with recorded_steps(llm) as steps:
            found = texts(generate(llm, plain.prompts, greedy(LENGTH)))
        assert found == plain.long
        assert max(len(step.num_scheduled_tokens) for step in steps) == MOST < len(plain.prompts)
        assert (spec_counters(llm) - before).acceptance_length > 1.3

    @pytest.mark.both_runners
    @pytest.mark.parametrize("name", ENDINGS)
    def test_a_text_ends_inside_an_accepted_branch_where_the_stock_text_ends(
        self, llm: LLM, plain: Plain, name: str
    ) -> None:
        scenario = plain.scenarios[name]
        with recorded_emissions(llm) as emitted:
            outputs = scenario.repeat_on(llm)
        assert outcome(outputs) == outcome(scenario.answers)
        stopped = sum(output.outputs[0].finish_reason == "stop" for output in outputs)
        assert stopped > len(outputs) // 2
        assert cut_off(emitted, outputs) > 0

    def test_max_tokens_cuts_an_accepted_branch(self, llm: LLM, plain: Plain) -> None:
        limits = [1 + index % 12 for index in range(len(plain.prompts))]
        with recorded_emissions(llm) as emitted:
            outputs = generate(llm, plain.prompts, [greedy(limit) for limit in limits])
        assert texts(outputs) == [text[:limit] for text, limit in zip(plain.long, limits, strict=True)]
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
        assert cut_off(emitted, outputs) > 0

    def test_a_single_token_is_the_stock_one(self, llm: LLM, plain: Plain) -> None:
        assert texts(generate(llm, plain.prompts, greedy(1))) == [text[:1] for text in plain.long]

    def test_the_models_length_cuts_drafts_and_ends_the_text_where_the_stock_text_ends(
        self, llm: LLM, plain: Plain
    ) -> None:
        scenario = plain.scenarios["to the model's length"]
        with recorded_steps(llm) as steps:
            outputs = scenario.repeat_on(llm)
        assert outcome(outputs) == outcome(scenario.answers)
        assert all(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == MAX_LENGTH for output in outputs)
        lengths = {len(draft) for step in steps for draft in step.scheduled_spec_decode_tokens.values()}
        assert lengths & set(range(1, NODES))

    def test_seeded_requests_draw_the_stock_text(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["seeded"]
        before = spec_counters(llm)
        assert outcome(scenario.repeat_on(llm)) == outcome(scenario.answers)
        assert (spec_counters(llm) - before).accepted > 0

    def test_completions_that_share_a_prompt_are_the_stock_ones(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["several completions"]
        outputs = scenario.repeat_on(llm)
        assert outcome(outputs) == outcome(scenario.answers)
        assert len({tuple(text) for text in texts(outputs)}) > len(outputs)

    def test_prompt_log_probabilities_are_the_stock_ones(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["prompt logprobs"]
        outputs = scenario.repeat_on(llm)
        assert outcome(outputs) == outcome(scenario.answers)
        for output, answer in zip(outputs, scenario.answers, strict=True):
            assert output.prompt_logprobs is not None
            assert answer.prompt_logprobs is not None
            for found, expected in zip(output.prompt_logprobs[1:], answer.prompt_logprobs[1:], strict=True):
                assert {token: entry.logprob for token, entry in found.items()} == pytest.approx(
                    {token: entry.logprob for token, entry in expected.items()}, abs=1e-4
                )

    @pytest.mark.both_runners
    def test_requests_with_a_grammar_and_trees_share_a_batch(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["with a grammar"]
        params = [each.clone() for each in scenario.params]
        for index, each in enumerate(params):
            each.extra_args = {"medusa_max_nodes": 3} if index % 5 == 4 else None
        with recorded_steps(llm) as steps:
            outputs = generate(llm, scenario.prompts, params)
        assert outcome(outputs) == outcome(scenario.answers)
        grammars = {output.request_id for output in outputs[::2]}
        drafted = [{req_id.rsplit("-", 1)[0] for req_id in step.scheduled_spec_decode_tokens} for step in steps]
        assert any(grammars & ids and ids - grammars for ids in drafted)
        drafts = [draft for step in steps for draft in step.scheduled_spec_decode_tokens.values()]
        trees = [draft for draft in drafts if isinstance(draft, TreeTokens)]
        assert any([*draft.parents[: len(draft)]] != [*range(len(draft))] for draft in trees)
        written = [output.outputs[0].text for output in outputs[::2]]
        assert set(written[::4]) <= set(COLOURS)
        assert all(re.fullmatch(CODE, text) for text in written[1::4])
        assert all(";" in text for text in written[3::4])
        assert all(json.loads(text).keys() == {"name", "size"} for text in written[2::4])

    def test_typical_acceptance_keeps_what_the_grammar_allows(self, llm: LLM, plain: Plain) -> None:
        params = [
            SamplingParams(
                temperature=0.9,
                seed=index,
                max_tokens=GRAMMAR,
                structured_outputs=StructuredOutputsParams(regex=SEGMENTS),
                extra_args={"medusa_acceptance": "typical"},
            )
            for index in range(MOST)
        ]
        before = spec_counters(llm)
        outputs = generate(llm, plain.prompts[:MOST], params)
        assert (spec_counters(llm) - before).accepted > 0
        assert all(re.fullmatch(r"([^;]{2};){0,9}[^;]{0,2}", output.outputs[0].text) for output in outputs)

    def test_prompts_of_one_token_give_the_stock_text(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["one-token prompts"]
        assert outcome(scenario.repeat_on(llm)) == outcome(scenario.answers)

    def test_a_prompt_of_one_token_joins_with_a_draft_of_padding_and_no_context(self, llm: LLM, plain: Plain) -> None:
        """It joins a request that has no tree in the same step."""
        single = plain.scenarios["one-token prompts"]
        with recorded_steps(llm) as steps:
            outputs = join(
                llm,
                first=("chain", plain.prompts[4], greedy(LENGTH, extra_args={"medusa_max_nodes": 1})),
                second=("single", single.prompts[0], single.params[0]),
            )
        assert padded(steps) == 1
        assert texts([outputs["chain"]]) == plain.long[4:5]
        assert outcome([outputs["single"]]) == outcome([single.answers[0]])

    def test_a_prompt_that_is_cached_but_for_one_token_joins_with_a_draft_of_padding(
        self, llm: LLM, plain: Plain
    ) -> None:
        index = next(index for index, prompt in enumerate(plain.prompts) if len(prompt) > BLOCK_SIZE)
        longer = plain.prompts[index] + plain.long[index]
        prompt = longer[: 2 * BLOCK_SIZE + 1]
        rest = longer[len(prompt) :][:24]
        generate(llm, [prompt], greedy(1))
        with recorded_steps(llm) as steps:
            outputs = join(
                llm, first=("other", plain.prompts[0], greedy(48)), second=("cached", prompt, greedy(len(rest)))
            )
        assert padded(steps) == 1
        assert outputs["cached"].num_cached_tokens == 2 * BLOCK_SIZE
        assert texts([outputs["cached"], outputs["other"]]) == [rest, plain.long[0][:48]]

    @pytest.mark.both_runners
    def test_blocks_that_accepted_rows_have_written_serve_later_prompts(self, llm: LLM, plain: Plain) -> None:
        assert llm.reset_prefix_cache()
        before = spec_counters(llm)
        generate(llm, plain.prompts, greedy(LENGTH - REST))
        assert (spec_counters(llm) - before).accepted > 0
        prompts = [prompt + text[: LENGTH - REST - 1] for prompt, text in zip(plain.prompts, plain.long, strict=True)]
        outputs = generate(llm, prompts, greedy(REST))
        for output, first in zip(outputs, plain.prompts, strict=True):
            assert output.num_cached_tokens is not None
            assert output.num_cached_tokens >= len(first) + LENGTH - REST - 1 - BLOCK_SIZE
        assert texts(outputs) == [text[LENGTH - REST - 1 : LENGTH - 1] for text in plain.long]

    def test_aborted_requests_leave_the_others_text_as_it_is(self, llm: LLM, plain: Plain) -> None:
        for index, prompt in enumerate(plain.prompts):
            llm.llm_engine.add_request(f"life-{index}", {"prompt_token_ids": prompt}, greedy(64))
        aborted = {f"life-{index}" for index in range(0, len(plain.prompts), 3)}
        remaining, outputs, step = sorted(aborted), {}, 0
        started: set[str] = set()
        deadline = monotonic() + PATIENCE
        while llm.llm_engine.has_unfinished_requests():
            assert monotonic() < deadline, "the engine does not finish its requests"
            for output in llm.llm_engine.step():
                started.add(output.request_id)
                if output.finished:
                    outputs[output.request_id] = output
            step += 1
            # While it waits, while its prompt is computed, or in the middle of its text.
            if step % 3 == 0 and remaining:
                llm.llm_engine.abort_request([remaining.pop()])
        assert not remaining
        assert aborted & started
        assert aborted - started
        survivors = [index for index in range(len(plain.prompts)) if index % 3]
        assert texts([outputs[f"life-{index}"] for index in survivors]) == [
            plain.long[index][:64] for index in survivors
        ]


class TestLittleRoom:
    """Steps of few tokens, and a cache that cannot hold the requests that run."""

    @pytest.fixture(scope="class")
    def llm(self, plain: Plain, target: Path, tiny_heads: Path, with_lookup: Callable[[Path], Path]) -> Iterator[LLM]:
        options = OPTIONS | {"max_num_batched_tokens": 48, "num_gpu_blocks_override": on(v1=13, v2=9)}
        with engine(target, heads=with_lookup(tiny_heads), tree=TREE, **options) as llm:
            yield llm

    def test_prompts_in_chunks_share_steps_with_trees_that_the_budget_cuts(self, llm: LLM, plain: Plain) -> None:
        with recorded_steps(llm) as steps:
            found = texts(generate_staggered(llm, plain.prompts, greedy(64), most=MOST))
        assert found == [text[:64] for text in plain.long]
        assert any(is_mixed(step) for step in steps)
        cut = [
            len(draft)
            for step in steps
            for draft in step.scheduled_spec_decode_tokens.values()
            if step.total_num_scheduled_tokens == 48 and 0 < len(draft) < NODES
        ]
        assert len(cut) > 10

    @pytest.mark.both_runners
    def test_preempted_requests_resume_with_the_stock_text(self, llm: LLM, plain: Plain) -> None:
        before = preemptions(llm)
        with recorded_steps(llm) as steps:
            found = texts(generate(llm, plain.prompts, greedy(LENGTH)))
        assert found == plain.long
        assert preemptions(llm) > before
        assert resumptions(steps) > 0

    def test_preempted_and_cut_requests_with_a_grammar_give_the_stock_text(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["with a grammar"]
        before = preemptions(llm)
        assert outcome(scenario.repeat_on(llm)) == outcome(scenario.answers)
        assert preemptions(llm) > before

    def test_preempted_requests_with_seeds_draw_the_stock_text(self, llm: LLM, plain: Plain) -> None:
        scenario = plain.scenarios["seeded"]
        before = preemptions(llm)
        assert outcome(scenario.repeat_on(llm)) == outcome(scenario.answers)
        assert preemptions(llm) > before
