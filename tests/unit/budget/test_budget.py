# SPDX-License-Identifier: Apache-2.0
"""Drafts are cut to what pays, by costs and by what was accepted; ranks agree whatever each has measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.unit.strategies import deterministic, trees
from vllm_medusa.budget.budget import Budget, node_depths
from vllm_medusa.budget.cost import Curve
from vllm_medusa.budget.growth import BEST_CHILD
from vllm_medusa.budget.pauses import LONGEST_PAUSE
from vllm_medusa.budget.store import Costs
from vllm_medusa.runner.v1.drafts import WaitingDrafts
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.options import TreeOptions
from vllm_medusa.tree.static import StaticTree, cartesian
from vllm_medusa.tree.topology import DraftTree

DEPTH = 2
PARENTS = [0, 1, 0]
FREE = Costs(verification=Curve(sizes=(1, 256), seconds=(1.0, 1.0)), proposal=Curve(sizes=(1,), seconds=(1e-9,)))
DEAR = Costs(verification=Curve(sizes=(1, 256), seconds=(1.0, 1e4)), proposal=Curve(sizes=(1,), seconds=(0.2,)))


def budget(costs: Costs) -> Budget:
    made = Budget(DEPTH)
    made.know(costs, max_rows=256, max_num_reqs=64)
    return made


def drafts(*probabilities: list[float]) -> Drafts:
    said = torch.tensor(probabilities)
    parents = torch.tensor([PARENTS] * len(said))
    return Drafts(torch.zeros_like(parents), parents, torch.full((len(said),), 3), said.log())


def all_emit(num_reqs: int) -> torch.Tensor:
    return torch.ones(num_reqs, dtype=torch.bool)


@deterministic
@given(trees(min_rows=2))
def test_depths_follow_from_parents(tree: DraftTree) -> None:
    assert torch.equal(node_depths(tree.parents[None, 1:], tree.depth), tree.depths[None, 1:])


def test_behind_its_end_a_draft_has_depths_that_there_are() -> None:
    """What a grammar has left of a draft goes on as a chain behind its end."""
    depths = node_depths(torch.tensor([[0, 1, 2, 3, 4, 5]]), max_depth=2)
    assert depths[0, :2].tolist() == [1, 2]
    assert int(depths.max()) == 2


def test_where_rows_cost_nothing_all_are_verified_and_none_where_they_cost_all() -> None:
    batch = drafts([0.9, 0.5, 0.1], [0.6, 0.3, 0.2])
    assert budget(FREE).cut(["a", "b"], batch, all_emit(2)).lengths.tolist() == [3, 3]
    assert budget(DEAR).cut(["a", "b"], batch, all_emit(2)).lengths.tolist() == [0, 0]


def test_before_costs_are_known_nothing_is_cut() -> None:
    assert Budget(DEPTH).cut(["a"], drafts([0.9, 0.5, 0.1]), all_emit(1)).lengths.tolist() == [3]


def test_a_number_is_heeded_and_limits_of_requests_are() -> None:
    batch = drafts([0.9, 0.8, 0.7], [0.6, 0.3, 0.2]).cut(torch.tensor([2, 3]))
    assert Budget(DEPTH, most=4).cut(["a", "b"], batch, all_emit(2)).lengths.tolist() == [2, 2]


def test_requests_in_the_midst_of_their_prompts_take_no_share() -> None:
    batch = drafts([0.9, 0.8, 0.7], [0.6, 0.3, 0.2])
    assert Budget(DEPTH, most=2).cut(["a", "b"], batch, torch.tensor([False, True])).lengths.tolist() == [0, 2]


def test_what_is_never_accepted_is_not_verified_for_long() -> None:
    """Rows cost half a step each, and heads that are sure but wrong lose their credit."""
    costs = Costs(verification=Curve(sizes=(1, 256), seconds=(1.0, 128.5)), proposal=Curve(sizes=(1,), seconds=(0.01,)))
    following, batch = budget(costs), drafts([0.9, 0.8, 0.1])
    lengths = []
    for _ in range(200):
        lengths.append(int(following.cut(["a"], batch, all_emit(1)).lengths))
        feed(following, ["a"], lengths[-1], accepted=0)
    assert lengths[0] == 2
    assert sum(lengths[100:]) < 5


def test_children_are_worth_asking_for_where_the_best_is_probably_better_than_what_is_left() -> None:
    """Rows cost a third of a step each, so of these nodes the first two are verified."""
    costs = Costs(verification=Curve(sizes=(1, 256), seconds=(1.0, 86.0)), proposal=Curve(sizes=(1,), seconds=(0.01,)))
    following, batch = budget(costs), drafts([0.9, 0.8, 0.1])
    assert following.least_parent(1) == 0.0
    for _ in range(200):
        assert int(following.cut(["a"], batch, all_emit(1)).lengths) == 2
    assert following.least_parent(1) == pytest.approx(0.1 / BEST_CHILD, rel=1e-3)
    assert following.least_parent(8) == 0.0


def test_where_a_number_is_verified_or_all_nodes_whole_trees_are_grown() -> None:
    for following in (Budget(DEPTH, most=1), budget(FREE)):
        for _ in range(50):
            following.cut(["a"], drafts([0.9, 0.8, 0.1]), all_emit(1))
        assert following.least_parent(1) == 0.0


def test_once_in_a_while_something_is_verified_that_does_not_seem_to_pay() -> None:
    following = budget(DEAR)
    lengths = [int(following.cut(["a"], drafts([0.9, 0.8, 0.1]), all_emit(1)).lengths) for _ in range(500)]
    assert set(lengths) == {0, 1}
    assert 0 < sum(lengths) < 500 / 16


def feed(following: Budget, req_ids: list[str], length: int, accepted: int) -> None:
    """Let requests verify their first nodes, of which the first were accepted."""
    rows = np.tile(np.arange(length + 1), len(req_ids))
    request = np.repeat(np.arange(len(req_ids)), length + 1)
    depth = np.array([0, 1, 2, 1])[rows]
    following.verified(req_ids, request, rows - 1, depth, rows <= accepted)


def test_ranks_that_have_measured_different_costs_ask_their_heads_in_the_same_steps_and_keep_the_same_parents() -> None:
    """Rank 0's lengths reach the scheduler; the others' do not matter, whatever they are."""
    ranks = [budget(DEAR), budget(FREE)]
    waiting = [WaitingDrafts(len(PARENTS)) for _ in ranks]
    req_ids = ["a", "b", "c"]
    asked: list[tuple[bool, ...]] = []
    for step in range(6 * LONGEST_PAUSE):
        if step == 4 * LONGEST_PAUSE:  # From here on rank 0 finds that speculation pays.
            ranks[0].know(FREE, max_rows=256, max_num_reqs=64)
        scheduled = 0
        asks = tuple(rank.asks_heads(len(req_ids)) for rank in ranks)
        asked.append(asks)
        if all(asks):
            batch = drafts([0.9, 0.8, 0.1], [0.9, 0.5, 0.1], [0.4, 0.3, 0.2])
            cut = [rank.cut(req_ids, batch, all_emit(3)) for rank in ranks]
            scheduled = int(cut[0].lengths.amin())
            for kept, own in zip(waiting, cut, strict=True):
                kept.keep(req_ids, own)
        for rank in ranks:
            feed(rank, req_ids, scheduled, accepted=min(1, scheduled))
        first, second = (kept.parents(req_ids) for kept in waiting)
        assert torch.equal(first, second)
    assert all(first == second for first, second in asked)
    assert len(set(asked)) == 2
    assert np.array_equal(ranks[0].correction.ratios, ranks[1].correction.ratios)


def test_a_static_tree_says_how_probable_its_paths_are_where_it_is_judged() -> None:
    tree = cartesian([3, 1, 1])
    assert tree.draft(torch.zeros(2, 3, 3, dtype=torch.int64)).log_probs is None
    options = TreeOptions(
        num_heads=3,
        vocab_size=90,
        accuracies=[[0.5, 0.2], [0.4, 0.1]],
        num_nodes=None,
        default_num_nodes=4,
        top_k=None,
        min_probability=None,
    )
    judged = options.judge(tree)
    assert isinstance(judged, StaticTree)
    found = judged.draft(torch.zeros(2, 3, 3, dtype=torch.int64))
    assert found.log_probs is not None
    for own in found.log_probs:
        assert own.exp().tolist() == pytest.approx(expected(tree.choices))


def expected(choices: list[list[int]]) -> list[float]:
    """The product of the accuracies along each path; the last head and rank that are known stand for more."""
    table = [[0.5, 0.2, 0.2], [0.4, 0.1, 0.1], [0.4, 0.1, 0.1]]
    found = []
    for path in choices:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= table[depth][rank]
        found.append(product)
    return found
