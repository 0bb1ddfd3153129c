from __future__ import annotations

import heapq
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.dynamic import MAX_CANDIDATES, DynamicTree
from vllm_medusa.tree.static import available_nodes
from vllm_medusa.tree.topology import DraftTree


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


def paths_of(tree: DynamicTree, candidate: torch.Tensor) -> list[tuple[int, ...]]:
    choices = [(), *map(tuple, tree.candidates.choices)]
    return [choices[index] for index in candidate.tolist()]


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
    for own, candidate in zip(log_probs, tree.grow(log_probs).candidate, strict=True):
        found = [probability(own, path) for path in paths_of(tree, candidate)]
        if tree.min_probability:  # the chain comes first then
            found.sort(reverse=True)
        assert found == pytest.approx(best_probabilities(own, tree.nodes), rel=1e-5)


@deterministic
@given(cases())
def test_every_path_comes_after_its_parent(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    for candidate in [*tree.grow(log_probs).candidate, tree.chain, torch.arange(len(tree))]:
        paths = paths_of(tree, candidate)
        assert paths[0] == ()
        assert len(set(paths)) == len(tree)
        assert all(path[:-1] in paths[:row] for row, path in enumerate(paths) if path)


@deterministic
@given(cases())
def test_rows_are_left_out_that_are_improbable_and_branches_that_are_not_worth_a_row_more(
    case: tuple[DynamicTree, torch.Tensor],
) -> None:
    tree, log_probs = case
    floor = tree.min_probability
    grown = tree.grow(log_probs)
    for own, candidate, length in zip(log_probs, grown.candidate, grown.length.tolist(), strict=True):
        paths = paths_of(tree, candidate)
        probabilities = {path: probability(own, path) for path in paths}
        if not floor:
            assert paths[:length] == [path for path, each in probabilities.items() if each > 0]
            continue
        chain, branches = ([path for path in paths[:length] if any(path) is side] for side in (False, True))
        assert paths[:length] == [*chain, *branches]
        for kept in (chain, branches):
            assert is_descending([probabilities[path] for path in kept])
        probable = {path: each for path, each in probabilities.items() if each > floor - 1e-6}
        surplus = sum(each - floor for path, each in probable.items() if any(path))
        if abs(surplus - floor) < 1e-5 or any(abs(each - floor) < 1e-6 for each in probabilities.values()):
            continue  # either is right
        assert set(chain) == {path for path in probable if not any(path)}
        assert set(branches) == {path for path in probable if any(path) and surplus > floor}


@deterministic
@given(cases())
def test_the_stack_holds_each_requests_tree(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    candidates = tree.grow(log_probs).candidate
    stack = tree.stack(candidates)
    for index, candidate in enumerate(candidates):
        paths = paths_of(tree, candidate)
        expected = DraftTree.from_parents([-1, *(paths.index(path[:-1]) for path in paths[1:])])
        assert torch.equal(stack.parents[index], expected.parents)
        assert torch.equal(stack.depths[index], expected.depths)
        assert torch.equal(stack.ancestors[index], expected.ancestors)
        assert torch.equal(stack.words[index], expected.bitmasks)


@deterministic
@given(cases())
def test_each_row_carries_the_token_of_its_head_and_rank(case: tuple[DynamicTree, torch.Tensor]) -> None:
    tree, log_probs = case
    tokens = torch.randperm(log_probs.numel(), generator=torch.Generator().manual_seed(0)).view(log_probs.shape)
    candidates = tree.grow(log_probs).candidate
    for own, candidate, drafted in zip(tokens, candidates, tree.fill(candidates, tokens).tolist(), strict=True):
        paths = paths_of(tree, candidate)[1:]
        assert drafted == [own[len(path) - 1, path[-1]].item() for path in paths]


def test_top_tokens_of_different_heads_mostly_come_true_together() -> None:
    """By the product alone (0.36 and 0.4), the second head's first token would come after the first head's second."""
    tree = DynamicTree(2, 2, 2, 0.0)
    grown = tree.grow(torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log())
    assert paths_of(tree, grown.candidate[0]) == [(), (0,), (0, 0)]


@pytest.mark.parametrize("min_probability", [0.0, 1e-50, 0.1])
def test_a_head_that_predicts_no_numbers_drafts_nothing(min_probability: float) -> None:
    tree = DynamicTree(2, 4, 2, min_probability)
    grown = tree.grow(torch.full((1, 2, 2), math.nan))
    assert grown.length.tolist() == [1]
    assert paths_of(tree, grown.candidate[0])[0] == ()


def test_the_chain_comes_first_where_it_is_asked_for() -> None:
    tree = DynamicTree(3, 7, 4, 0.0)
    assert paths_of(tree, tree.chain)[: tree.chain_length + 1] == [(), (0,), (0, 0), (0, 0, 0)]


def test_more_nodes_than_there_are_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 6 nodes, not 7; lower num_speculative_tokens"):
        DynamicTree(2, 7, 2, 0.0)


def test_more_candidates_than_can_be_weighed_are_refused() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_CANDIDATES} paths for 1000 nodes"):
        DynamicTree(5, 1000, 10, 0.0)
