# SPDX-License-Identifier: Apache-2.0
"""The correction on the device against the one on the host, and what its confidences promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import Step, deterministic, steps
from vllm_medusa.budget.budget import node_depths
from vllm_medusa.budget.correction import Correction
from vllm_medusa.budget.device_correction import DeviceCorrection
from vllm_medusa.step.derive_kernel import derive_trees_on_device
from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.static import cartesian

NUM_STATES = 9


@st.composite
def ratios(draw: st.DrawFn, max_depth: int) -> tuple[list[float], list[float]]:
    counts = st.lists(st.floats(0, 40, width=32), min_size=max_depth + 1, max_size=max_depth + 1)
    return draw(counts), draw(counts)


def drafts_of(step: Step, seed: int) -> Drafts:
    """Drafts of a step's trees, with random probabilities, some of them none at all, in no order."""
    generator = torch.Generator().manual_seed(seed)
    parents = step.draft_parents
    log_probs = torch.rand(parents.shape, generator=generator).log()
    log_probs.masked_fill_(torch.rand(parents.shape, generator=generator) < 0.1, -torch.inf)
    lengths = torch.randint(0, parents.shape[1] + 1, (len(parents),), generator=generator)
    return Drafts(torch.zeros_like(parents), parents, lengths, log_probs)


def rate(correction: DeviceCorrection, drafts: Drafts, states: torch.Tensor) -> torch.Tensor:
    confidences = torch.full(drafts.parents.shape, torch.nan)
    correction.rate(drafts, states, confidences)
    return confidences


@settings(deterministic, max_examples=30)
@given(steps(), st.data(), st.integers(0, 99))
def test_the_running_product_is_each_nodes_corrected_probability(step: Step, data: st.DataObject, seed: int) -> None:
    drafts = drafts_of(step, seed)
    depths = node_depths(drafts.parents, drafts.parents.shape[1])
    depth = int(depths.max())
    states = torch.randperm(NUM_STATES, generator=torch.Generator().manual_seed(seed))[: len(depths)]
    correction, on_host = DeviceCorrection(depth, depths.shape[1], NUM_STATES, torch.device("cpu")), Correction(depth)
    on_host._expected[:], on_host._accepted[:] = data.draw(ratios(depth))
    correction.expected.copy_(torch.from_numpy(on_host._expected))
    correction.accepted.copy_(torch.from_numpy(on_host._accepted))
    confidences = rate(correction, drafts, states)
    assert ((confidences >= 0) & (confidences <= 1)).all()
    assert drafts.log_probs is not None
    is_node = torch.arange(depths.shape[1]) < drafts.lengths[:, None]
    said = drafts.log_probs.exp() * is_node
    torch.testing.assert_close(confidences.cumprod(dim=1), on_host.apply(said, depths), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(correction.said[states], said)


def test_drafts_of_a_static_tree_share_their_memory() -> None:
    tree = replace(cartesian([2, 1]), log_probs=torch.tensor([0.5, 0.25, 0.75, 0.5]).log())
    confidences = rate(
        DeviceCorrection(2, 4, NUM_STATES, torch.device("cpu")),
        tree.draft(torch.zeros(3, 2, 2, dtype=torch.int64)),
        torch.tensor([5, 0, 2]),
    )
    assert confidences.tolist() == [[0.5, 0.5, 1, 1]] * 3


@settings(deterministic, max_examples=30)
@given(steps(), st.integers(0, 99), st.integers(0, 80))
def test_the_most_probable_nodes_of_all_drafts_are_a_tree_of_each(step: Step, seed: int, budget: int) -> None:
    drafts = drafts_of(step, seed)
    correction = DeviceCorrection(step.num_nodes, step.num_nodes, NUM_STATES, torch.device("cpu"))
    survival = rate(correction, drafts, torch.arange(len(drafts.parents))).cumprod(dim=1)
    assert (survival.diff(dim=1) <= 0).all()
    # As vLLM's manager does: so many of the greatest, and of each request as many of its first nodes as are among them.
    winners = survival.flatten().topk(min(budget, survival.numel())).indices // survival.shape[1]
    admitted = np.bincount(winners.numpy(), minlength=len(survival))
    for parents, length in zip(drafts.parents.tolist(), admitted.tolist(), strict=True):
        assert all(parent <= node for node, parent in enumerate(parents[:length]))


@settings(deterministic, max_examples=30)
@given(steps(), st.integers(0, 99))
def test_a_step_teaches_what_it_teaches_on_the_host(step: Step, seed: int) -> None:
    generator, num_reqs = torch.Generator().manual_seed(seed), len(step.requests)
    states = torch.randperm(NUM_STATES, generator=generator)[:num_reqs]
    depth = step.num_nodes
    correction, on_host = DeviceCorrection(depth, step.num_nodes, NUM_STATES, torch.device("cpu")), Correction(depth)
    drafts = drafts_of(step, seed)
    drafts = replace(drafts, lengths=torch.full_like(drafts.lengths, step.num_nodes))
    rate(correction, drafts, states)
    parents = torch.zeros(NUM_STATES, step.num_nodes, dtype=torch.int64)
    parents[states] = drafts.parents
    trees = derive_trees_on_device(
        parents,
        states,
        step.query_start_loc.int(),
        step.cu_num_rows.int(),
        step.logits_indices,
        step.input_ids,
        step.positions,
        depth,
        step.num_drafting_reqs,
        StepTrees.allocate(step.num_nodes, num_reqs, len(step.input_ids), torch.device("cpu")),
    )
    num_rows = step.cu_num_rows.diff()
    request = torch.arange(num_reqs).repeat_interleave(num_rows)
    local = torch.arange(len(request)) - step.cu_num_rows[request]
    # A request whose root is a part of its prompt has a draft that nobody has drafted.
    is_drafted = torch.rand(num_reqs, generator=generator) < 0.8
    roots = trees.root_positions[:num_reqs]
    prefill_len = torch.full((NUM_STATES,), 10_000, dtype=torch.int32)
    prefill_len[states] = torch.where(is_drafted, roots, roots + 1)
    depths = trees.depths[trees.logits_indices]
    reached = torch.stack([(depths * (request == index)).max() for index in range(num_reqs)])
    lengths = 1 + (torch.rand(num_reqs, generator=generator) * (reached + 1)).long()
    correction.observe(trees, lengths.int(), states, states[request], local.int(), prefill_len)

    counts = (local > 0) & is_drafted[request]
    assert drafts.log_probs is not None
    said = drafts.log_probs.exp()[request[counts], local[counts] - 1]
    on_host.observe(depths[counts].numpy(), said.numpy(), np.zeros(len(said), dtype=bool))
    accepted = torch.zeros(depth + 1)
    for length, drafted in zip(lengths.tolist(), is_drafted.tolist(), strict=True):
        accepted[1:length] += drafted
    torch.testing.assert_close(correction.expected, torch.from_numpy(on_host._expected).float())
    torch.testing.assert_close(correction.accepted, accepted)
