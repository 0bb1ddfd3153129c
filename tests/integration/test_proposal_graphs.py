# SPDX-License-Identifier: Apache-2.0
"""On model runner V2 the proposal is captured and replayed; graphs are recorded and replayed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import LLM
from vllm.config.compilation import CUDAGraphMode

from tests.integration.engines import engine, generate, greedy, model_runner
from tests.integration.recorded_graphs import recorded_graphs
from tests.under_test import UNDER_TEST
from vllm_medusa.runner.v2.model_runner import MedusaModelRunner
from vllm_medusa.runner.v2.proposal_graphs import ProposalGraphs
from vllm_medusa.tree.lookup import last_tokens

pytestmark = [
    pytest.mark.both_runners,
    pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 serves CPUs, which capture nothing"),
]
SIZES = [1, 2, 4]


def capture(runner: MedusaModelRunner) -> ProposalGraphs:
    runner.compilation_config.cudagraph_capture_sizes = SIZES
    runner.compilation_config.max_cudagraph_capture_size = SIZES[-1]
    runner.speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    graphs = runner.speculator.graphs
    assert graphs is not None
    assert graphs.needs_capture()
    runner.speculator.capture()
    assert sorted(desc.num_reqs or 0 for desc in graphs.graphs) == SIZES
    return graphs


def texts(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in generate(llm, prompts, greedy(12))]


def write_texts(runner: MedusaModelRunner) -> torch.Tensor:
    """Write random texts of few tokens into the runner's first rows; return their ends."""
    states, rows = runner.req_states, torch.arange(4)
    states.all_token_ids.gpu[rows] = torch.randint(3, (4, states.all_token_ids.gpu.shape[1]), dtype=torch.int32)
    states.total_len.gpu[rows] = torch.tensor([40, 30, 60, 50], dtype=torch.int32)
    lengths = states.total_len.gpu[rows].long()
    return last_tokens(states.all_token_ids.gpu, rows, lengths, runner.max_model_len)


def num_replays(graphs: ProposalGraphs) -> list[int]:
    return [graph.replays for _, graph in sorted(graphs.graphs.items(), key=lambda each: each[0].num_tokens)]


@pytest.fixture(
    scope="module",
    params=[
        ([3, 2, 1], "tiny_heads"),
        ("dynamic", "tiny_heads"),
        ("dynamic", "tiny_sequential_heads"),
        ("dynamic", "tiny_sequential_heads_with_lookup"),
    ],
    ids=["static", "dynamic", "sequential", "lookup"],
)
def llm(tiny_target: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    tree, heads = request.param
    options = {"heads": request.getfixturevalue(heads), "tree": tree, "max_num_batched_tokens": 128}
    with engine(tiny_target, **options) as llm, recorded_graphs():
        yield llm


def test_proposals_are_those_of_the_heads_with_graphs_and_without(llm: LLM, held_out_prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    prompts, runner = held_out_prompts[:3], model_runner(llm)
    eager = runner.speculator.graphs
    assert eager is not None
    assert not eager.needs_capture()
    assert eager.replay(1) is None
    expected = texts(llm, prompts)
    graphs = capture(runner)
    proposer = runner.speculator.proposer
    for num_reqs in (1, 3, 2, 4):
        graphs.buffers.hidden.normal_()
        graphs.buffers.roots.random_(90)
        if graphs.buffers.texts is not None:
            write_texts(runner)
            graphs.buffers.texts.rows.random_(4)
        replayed, drafts = graphs.replay(num_reqs), proposer.propose(*graphs.buffers.inputs(num_reqs))
        assert replayed is not None
        for name in ("tokens", "parents", "lengths"):
            assert torch.equal(getattr(replayed, name), getattr(drafts, name))
    assert graphs.replay(5) is None
    assert num_replays(graphs) == [1, 1, 2]
    assert texts(llm, prompts) == expected
    assert num_replays(graphs)[2] > 3


def test_a_replayed_proposal_waits_in_the_states_of_its_requests(llm: LLM) -> None:
    runner = model_runner(llm)
    graphs, speculator = capture(runner), runner.speculator
    hidden = torch.randn(2, runner.model_config.get_hidden_size())
    batch = SimpleNamespace(num_reqs=2, idx_mapping=torch.tensor([1, 0]))
    arguments = (batch, {}, {}, hidden, None, None, None, roots := torch.zeros(2, dtype=torch.int64))
    speculator.stopped_at = torch.tensor([1, 0])
    texts_of_rows = write_texts(runner) if speculator.proposer.looks_up else None
    tokens = speculator.propose(*arguments)
    text = None if texts_of_rows is None else texts_of_rows[[1, 0]]
    drafts = speculator.proposer.propose(hidden.flip(0), roots, text)
    assert torch.equal(tokens, drafts.tokens)
    if text is not None:
        others = speculator.proposer.propose(hidden.flip(0), roots, text.flip(0))
        assert not torch.equal(tokens, others.tokens)
    assert torch.equal(speculator.drafts.by_state[:2], drafts.parents.flip(0))
    assert num_replays(graphs) == [0, 1, 0]
