# SPDX-License-Identifier: Apache-2.0
"""On model runner V2 a decode step launches few kernels of ours, and nothing in it waits for the device."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.integration.engines import Tree, engine, generate, greedy, model_runner, spec_counters
from tests.integration.launches import PACKAGE, Watch
from tests.integration.recorded_graphs import recorded_graphs
from tests.integration.test_proposal_graphs import capture
from tests.rehearsal.graphs import RecordedGraph
from tests.under_test import UNDER_TEST

pytestmark = [
    pytest.mark.both_runners,
    pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 serves CPUs, whose results are on the host"),
]
TOKENS = 7
STAGES = {"plan": 1, "verification": 1, "commit": 1, "proposal": 2, "other": 2}
STATIC = {**STAGES, "graph": 10}
DYNAMIC = {**STAGES, "graph": 29}
SEQUENTIAL = {**STATIC, "proposal": 3, "graph": 50}
SEQUENTIAL_DYNAMIC = {**DYNAMIC, "proposal": 3, "graph": 94}
WITH_LOOKUP = {**DYNAMIC, "proposal": 4, "graph": 231}
CHAIN = {**STAGES, "commit": 0, "graph": 10}
"""Of one step, with four heads, two layers and one KV cache group, in fp32; docs/architecture.md states them. All other
launches are the layers' attention, which a GPU has in the target's graph; here chains have the trees' attention too."""


@pytest.mark.parametrize(
    ("tree", "heads", "launches"),
    [
        ([3, 2, 1], "tiny_heads", STATIC),
        ("dynamic", "tiny_heads", DYNAMIC),
        ("chain", "tiny_heads", CHAIN),
        ([3, 2, 1], "tiny_sequential_heads", SEQUENTIAL),
        ("dynamic", "tiny_sequential_heads", SEQUENTIAL_DYNAMIC),
        ("dynamic", "tiny_sequential_heads_with_lookup", WITH_LOOKUP),
    ],
    ids=["static", "dynamic", "chain", "sequential static", "sequential dynamic", "with lookup"],
)
def test_a_step_launches_few_kernels_and_waits_for_none(
    tree: Tree,
    heads: str,
    launches: dict[str, int],
    tiny_target: Path,
    held_out_prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    trained = request.getfixturevalue(heads)
    seeded = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    steps: list[Counter[str]] = []
    with engine(tiny_target, heads=trained, tree=tree, max_num_batched_tokens=128) as llm, recorded_graphs():
        runner, watch = model_runner(llm), Watch(stage="other", whole=frozenset({"proposal"}))
        verifier = runner.rejection_sampler
        runner.speculator.proposer.model.lm_heads.parts.clear()  # Multiply as on a GPU, all heads at once.
        capture(runner)
        replay = watch.watching(None, RecordedGraph.replay)

        def counted_replay(graph: RecordedGraph) -> None:
            watch.launches["graph"] += graph.launches
            replay(graph)

        monkeypatch.setattr(RecordedGraph, "replay", counted_replay)
        runner.prepare_attn = watch.watching("plan", runner.prepare_attn)
        if runner._commit is not None:
            runner._commit = watch.watching("commit", runner._commit)
        runner.speculator.propose = watch.watching("proposal", runner.speculator.propose)
        watched_call = watch.watching("verification", type(verifier).__call__)
        verifier.__class__ = type("Watched", (type(verifier),), {"__call__": watched_call})
        prepare_inputs = runner.prepare_inputs

        def counted(*args: Any) -> Any:
            steps.append(Counter(watch.launches))
            return prepare_inputs(*args)

        runner.prepare_inputs = counted
        with watch, watch.kernels(), watch.reads():
            generate(llm, held_out_prompts[:3], [greedy(TOKENS), seeded, greedy(TOKENS)])
        assert spec_counters(llm).accepted > 0
    assert not watch.waits
    each = [after - before for before, after in pairwise(steps)]
    found = {stage: median(step[stage] for step in each) for stage in launches}
    print("\nlaunches of a step:", found)
    assert found == launches


def test_the_watch_sees_waits_in_the_plugin_and_there_alone() -> None:
    watch = Watch()
    waiting = "torch.arange(3).tolist(); torch.arange(3)[torch.tensor([True, False, True])]"
    with watch, watch.reads():
        exec(waiting, {"torch": torch})
        assert not watch.waits
        exec(compile(waiting, str(PACKAGE / "x.py"), "exec"), {"torch": torch})
    assert watch.waits == {"x.py:1 tolist", "x.py:1 aten.index.Tensor"}
