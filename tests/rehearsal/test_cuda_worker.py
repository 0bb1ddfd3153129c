# SPDX-License-Identifier: Apache-2.0
"""The CUDA worker starts, warms up, captures its graphs and serves, and says what plain decoding says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm import LLM
from vllm.sampling_params import RequestOutputKind

from tests.integration.engines import (
    Tree,
    engine,
    generate,
    greedy,
    model_runner,
    recorded_steps,
    spec_counters,
    texts,
)
from tests.under_test import UNDER_TEST
from vllm_medusa.attention.triton.backend import TreeBuilderMixin
from vllm_medusa.runner.gpu_worker import MedusaGPUWorker

pytestmark = pytest.mark.both_runners
TOKENS, MORE_TOKENS = 5, 8


@dataclass(frozen=True)
class Case:
    """What an engine verifies, and for how many requests its graphs are captured."""

    tree: Tree
    nodes: int
    heads: str = "tiny_heads"
    captured: tuple[int, int] = (1, 3)
    """By default two are padded to three, and four are too many."""

    @property
    def most(self) -> int:
        """How many requests run together at most: one too many for any graph."""
        return max(self.captured) + 1


CASES = {
    "static 31": Case("sparse", 31),
    "dynamic 31": Case("dynamic", 31),
    "dynamic 31 with lookup": Case("dynamic", 31, "tiny_sequential_heads_with_lookup"),
}
if "triton" in UNDER_TEST.words:
    # Rows of a large tree take long to interpret, so that none are padded.
    CASES = {"chain": Case("chain", 4), "static 63": Case("sparse", 63, captured=(1, 2))}


@pytest.fixture(scope="module")
def prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return [prompt[:12] for prompt in held_out_prompts[:4]]


@pytest.fixture(scope="module")
def plain(tiny_target: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(tiny_target) as llm:
        return texts(generate(llm, prompts, greedy(MORE_TOKENS)))


def join(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Decode two prompts, and a third that joins as they verify their first drafts."""
    core, found = llm.llm_engine, {}

    def add(index: int) -> None:
        params = greedy(MORE_TOKENS, output_kind=RequestOutputKind.FINAL_ONLY)
        core.add_request(f"join {index}", {"prompt_token_ids": prompts[index]}, params)

    add(0)
    add(1)
    core.step()
    add(2)
    while core.has_unfinished_requests():
        found |= {output.request_id: list(output.outputs[0].token_ids) for output in core.step()}
    return [found[f"join {index}"] for index in range(3)]


@contextmanager
def rehearsed(target: Path, heads: Path, case: Case) -> Iterator[LLM]:
    sizes = [(case.nodes + 1) * requests for requests in case.captured]
    options: dict[str, Any] = {
        "max_num_seqs": case.most,
        "max_num_batched_tokens": 512,
        "speculative_config": {"num_speculative_tokens": case.nodes},
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes},
    }
    with engine(target, heads=heads, tree=case.tree, **options) as llm:
        yield llm


@contextmanager
def noise_between_steps(llm: LLM) -> Iterator[None]:
    """Before each step, overwrite what steps share, as far as stock vLLM lets any step find it changed."""
    runner = model_runner(llm)
    prepare_inputs, generator = runner.prepare_inputs, torch.Generator().manual_seed(0)

    def prepare(*args: Any) -> Any:
        trees = runner._buffers
        for buffer in (trees.tokens, trees.parents, trees.depths):
            buffer.random_(-99, 99, generator=generator)
        for buffer in (trees.positions, trees.root_positions):
            buffer.random_(0, 99, generator=generator)
        trees.ancestor_bits.random_(generator=generator)
        runner.input_buffers.input_ids.random_(0, 1024, generator=generator)
        runner.input_buffers.positions.random_(0, 512, generator=generator)
        return prepare_inputs(*args)

    with patch.object(runner, "prepare_inputs", prepare):
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replayed_and_eager_steps_say_what_plain_decoding_says(
    case: Case, tiny_target: Path, prompts: list[list[int]], plain: list[list[int]], request: pytest.FixtureRequest
) -> None:
    with (
        rehearsed(tiny_target, request.getfixturevalue(case.heads), case) as llm,
        noise_between_steps(llm),
        recorded_steps(llm) as steps,
    ):
        found = [texts(generate(llm, prompts[:together], greedy(TOKENS))) for together in (1, 2, case.most)]
        joined = join(llm, prompts)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        replays = {desc.num_reqs: graph.replays for desc, graph in model_runner(llm).cudagraph_manager.graphs.items()}
        accepted = spec_counters(llm).accepted
    assert isinstance(worker, MedusaGPUWorker)
    for tokens in found:
        assert tokens == [each[:TOKENS] for each in plain[: len(tokens)]]
    assert joined == plain[:3]
    assert accepted > 0
    assert set(replays) == set(case.captured)
    assert all(replays.values())
    drafting = [step for step in steps if step.scheduled_spec_decode_tokens]
    assert {len(step.num_scheduled_tokens) for step in drafting} == {*range(1, case.most + 1)}
    assert sum(replays.values()) < len(drafting)
    assert any(step.scheduled_new_reqs for step in drafting)


@pytest.mark.skipif("triton" in UNDER_TEST.words, reason="asks nothing of attention")
def test_masks_that_are_copied_at_the_capture_are_found(
    tiny_target: Path, tiny_heads: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = TreeBuilderMixin.build_for_cudagraph_capture

    def copying(builder: Any, common: Any) -> Any:
        metadata = capture(builder, common)
        step = metadata.step
        object.__setattr__(step, "ancestor_bits", step.ancestor_bits.clone())
        return metadata

    monkeypatch.setattr(TreeBuilderMixin, "build_for_cudagraph_capture", copying)
    with (
        pytest.raises(Exception, match="freed after its capture"),
        rehearsed(tiny_target, tiny_heads, Case("sparse", 7)) as llm,
    ):
        generate(llm, prompts[:1], greedy(6))
