# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import heapq
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.best_first import available_nodes
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.dynamic import MAX_CANDIDATES, DynamicTree


@st.composite
def growers(draw: st.DrawFn) -> DynamicTree:
    heads, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    nodes = draw(st.integers(1, min(20, available_nodes(heads, top_k))))
    return DynamicTree(heads, nodes, top_k, draw(st.sampled_from([0.0, 0.05, 0.3])))


def log_probs_for(draw: st.DrawFn, tree: DynamicTree, requests: int) -> torch.Tensor:
    """Draw sorted probabilities, equal ones and zeros among them."""
    share = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 1.0])
    size = requests * tree.num_heads * tree.top_k
    values = torch.tensor(draw(st.lists(share, min_size=size, max_size=size)))
    return values.view(requests, tree.num_heads, tree.top_k).sort(dim=-1, descending=True).values.log()


@st.composite
def cases(draw: st.DrawFn) -> tuple[DynamicTree, torch.Tensor]:
    tree = draw(growers())
    return tree, log_probs_for(draw, tree, draw(st.integers(1, 4)))


def distinct_tokens(log_probs: torch.Tensor) -> torch.Tensor:
    """Return tokens that tell their request, head and rank."""
    return torch.arange(log_probs.numel()).view(log_probs.shape)


def grow(tree: DynamicTree, log_probs: torch.Tensor) -> Drafts:
    return tree.draft(distinct_tokens(log_probs), log_probs)


def paths_of(tree: DynamicTree, drafts: Drafts, index: int) -> list[tuple[int, ...]]:
    """Read a draft's paths off its tokens and parents, the root's first; asserts that each token is its depth's."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(drafts.tokens[index].tolist(), drafts.parents[index].tolist(), strict=True):
        request, place = divmod(token, tree.num_heads * tree.top_k)
        head, rank = divmod(place, tree.top_k)
        assert (request, head) == (index, len(paths[parent]))
        paths.append((*paths[parent], rank))
    return paths


def followed(path: tuple[int, ...]) -> int:
    """Count the tokens at the path's beginning that are their heads' first."""
    return next((depth for depth, rank in enumerate(path) if rank), len(path))


def probability(log_probs: torch.Tensor, path: tuple[int, ...]) -> float:
    tokens = [log_probs[depth, rank].exp().item() for depth, rank in enumerate(path)]
    chain, others = tokens[: followed(path)], tokens[followed(path) :]
    return math.sqrt(min(chain, default=1.0) * math.prod(chain)) * math.prod(others)


def is_descending(values: list[float]) -> bool:
    return all(after <= before + 1e-6 for before, after in pairwise(values))


def best_probabilities(log_probs: torch.Tensor, nodes: int) -> list[float]:
    """Search all paths best-first, one by one."""
    heads, ranks = log_probs.shape
    frontier: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    found: list[float] = []
    while len(found) <= nodes:
        _, path = heapq.heappop(frontier)
        found.append(probability(log_probs, path))
        for rank in range(ranks if len(path) < heads else 0):
            heapq.heappush(frontier, (-probability(log_probs, (*path, rank)), (*path, rank)))
    return found


@deterministic
@given(cases())
def test_the_most_probable_paths_are_grown_best_first(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    drafts = grow(tree, log_probs)
    for index, own in enumerate(log_probs):
        found = [probability(own, path) for path in paths_of(tree, drafts, index)]
        assert found == pytest.approx(best_probabilities(own, tree.num_nodes), rel=1e-5)


@deterministic
@given(cases())
def test_every_path_comes_after_its_parent(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    drafts = grow(tree, log_probs)
    node = torch.arange(tree.num_nodes)
    assert ((drafts.parents >= 0) & (drafts.parents <= node)).all()
    for index in range(len(log_probs)):
        assert len(set(paths_of(tree, drafts, index))) == tree.num_nodes + 1


@deterministic
@given(cases())
def test_the_scores_are_the_paths_log_probabilities(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    drafts = grow(tree, log_probs)
    assert drafts.log_probs is not None
    for index, own in enumerate(log_probs):
        length = int(drafts.lengths[index])
        expected = [probability(own, path) for path in paths_of(tree, drafts, index)[1 : length + 1]]
        assert drafts.log_probs[index, :length].exp().tolist() == pytest.approx(expected, rel=1e-5)


@deterministic
@given(cases())
def test_paths_that_are_improbable_are_left_out(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    drafts = grow(tree, log_probs)
    for index, own in enumerate(log_probs):
        paths, length = paths_of(tree, drafts, index)[1:], int(drafts.lengths[index])
        probabilities = [probability(own, path) for path in paths]
        assert is_descending(probabilities[:length])
        floor = tree.min_probability
        if any(abs(each - floor) < 1e-6 for each in probabilities) and floor:
            continue  # either is right
        assert length == sum(each > 0 and each >= floor for each in probabilities)


def test_top_tokens_of_different_heads_mostly_come_true_together() -> None:
    """By the product alone (0.36 and 0.4), the second head's first token would come after the first head's second."""
    tree = DynamicTree(2, 2, 2, 0.0)
    drafts = grow(tree, torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log())
    assert paths_of(tree, drafts, 0) == [(), (0,), (0, 0)]


@pytest.mark.parametrize("min_probability", [0.0, 1e-50, 0.1])
def test_a_head_that_predicts_no_numbers_drafts_nothing(min_probability: float) -> None:
    tree = DynamicTree(2, 4, 2, min_probability)
    drafts = grow(tree, torch.full((1, 2, 2), math.nan))
    assert drafts.lengths.tolist() == [0]
    assert drafts.padded_tokens().tolist() == [[-1] * 4]
    assert paths_of(tree, drafts, 0)[0] == ()


def test_more_nodes_than_there_are_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 6 nodes, not 7; lower num_speculative_tokens"):
        DynamicTree(2, 7, 2, 0.0)


def test_more_candidates_than_can_be_weighed_are_refused() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_CANDIDATES} paths for 1000 nodes"):
        DynamicTree(5, 1000, 10, 0.0)
