# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.best_first import (
    IndependentHeads,
    JointPaths,
    PathAccuracies,
    available_nodes,
    best_first,
    expected_acceptance_length,
    path_probabilities,
)
from vllm_medusa.tree.static import from_choices

Path = tuple[int, ...]

SIZES = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (4, 1)]
"""Heads and ranks that give at most 14 nodes below the root."""


@st.composite
def independent(draw: st.DrawFn) -> IndependentHeads:
    heads, ranks = draw(st.sampled_from(SIZES))
    cell = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    rows = draw(st.lists(st.lists(cell, min_size=ranks, max_size=ranks), min_size=heads, max_size=heads))
    return IndependentHeads(torch.tensor(rows, dtype=torch.float64))


@st.composite
def joint(draw: st.DrawFn) -> JointPaths:
    """What is counted on a few positions, at each of which every head is right at some rank or at none."""
    heads, ranks = draw(st.sampled_from(SIZES))
    position = st.lists(st.integers(0, ranks), min_size=heads, max_size=heads)
    return counted(draw(st.lists(position, min_size=1, max_size=12)), ranks)


def counted(positions: list[list[int]], ranks: int) -> JointPaths:
    counts = Counter(
        tuple(ranks_right[:depth])
        for ranks_right in positions
        for depth in range(1, len(ranks_right) + 1)
        if max(ranks_right[:depth]) < ranks
    )
    return JointPaths({path: count / len(positions) for path, count in counts.items()})


def values_of(accuracies: PathAccuracies) -> dict[Path, float]:
    """Return every path's probability, by definition."""
    if isinstance(accuracies, JointPaths):
        return dict(accuracies.accuracies)
    assert isinstance(accuracies, IndependentHeads)
    heads, ranks = accuracies.accuracies.shape
    rows = accuracies.accuracies.tolist()
    paths = (path for depth in range(heads) for path in product(range(ranks), repeat=depth + 1))
    return {path: prod(rows[depth][rank] for depth, rank in enumerate(path)) for path in paths}


@settings(deterministic, max_examples=100)
@given(independent() | joint(), st.data())
def test_best_first_has_the_largest_sum_of_path_probabilities(accuracies: PathAccuracies, data: st.DataObject) -> None:
    value = values_of(accuracies)
    if not value:
        return
    nodes = data.draw(st.integers(1, min(len(value), 7)))
    tree = best_first(accuracies, nodes)
    assert len(tree) == nodes + 1
    every_tree = (some for some in combinations(value, nodes) if all(p[:-1] in ((), *some) for p in some))
    best = max(sum(value[path] for path in some) for some in every_tree)
    assert sum(value[tuple(path)] for path in tree.choices) == pytest.approx(best)


@deterministic
@given(independent() | joint(), st.data())
def test_a_prefix_of_best_first_is_the_smaller_best_first(accuracies: PathAccuracies, data: st.DataObject) -> None:
    if not accuracies.available:
        return
    nodes = data.draw(st.integers(1, accuracies.available))
    fewer = data.draw(st.integers(1, nodes))
    assert best_first(accuracies, nodes).prefix(fewer + 1).choices == best_first(accuracies, fewer).choices


@deterministic
@given(independent() | joint(), st.data())
def test_a_node_is_accepted_with_its_paths_probability(accuracies: PathAccuracies, data: st.DataObject) -> None:
    if not accuracies.available:
        return
    tree = best_first(accuracies, data.draw(st.integers(1, accuracies.available)))
    value = values_of(accuracies)
    expected = [value[tuple(path)] for path in tree.choices]
    assert path_probabilities(tree, accuracies) == pytest.approx(expected)
    assert expected_acceptance_length(tree, accuracies) == pytest.approx(1 + sum(expected))


def test_the_expected_acceptance_length_is_that_of_independent_heads() -> None:
    """Each outcome's tokens, weighted: head 1 right with its first or second token, head 2 below the first."""
    table = torch.tensor([[0.5, 0.25], [0.5, 0.0]], dtype=torch.float64)
    tree = from_choices([[0], [1], [0, 0]])
    expected = 0.25 * 1 + 0.25 * 2 + 0.25 * 2 + 0.25 * 3
    assert expected_acceptance_length(tree, IndependentHeads(table)) == expected


def test_heads_that_are_right_together_get_a_better_tree_from_their_paths_than_from_the_product() -> None:
    """The second head's second token is right exactly where the first head's is; rank 2 stands for none."""
    joint = counted([[0, 0]] * 4 + [[1, 1]] * 3 + [[2, 2]] * 3, ranks=2)
    independent = IndependentHeads(torch.tensor([[0.4, 0.3], [0.4, 0.3]], dtype=torch.float64))
    by_product, by_paths = (best_first(each, 4) for each in (independent, joint))
    assert by_product.choices == [[0], [1], [0, 0], [0, 1]]
    assert by_paths.choices == [[0], [0, 0], [1], [1, 1]]
    assert expected_acceptance_length(by_product, joint) == pytest.approx(1 + 0.4 + 0.3 + 0.4 + 0)
    assert expected_acceptance_length(by_paths, joint) == pytest.approx(1 + 0.4 + 0.4 + 0.3 + 0.3)


def test_best_first_goes_as_deep_as_the_accuracies_are_worth() -> None:
    tree = best_first(IndependentHeads(torch.tensor([[0.6, 0.2], [0.5, 0.3]])), 5)
    assert tree.choices == [[0], [0, 0], [1], [0, 1], [1, 0]]


def test_paths_that_are_too_long_or_of_too_high_ranks_are_left_out() -> None:
    joint = JointPaths({(0,): 0.5, (1,): 0.3, (0, 0): 0.25, (0, 1): 0.125, (0, 0, 0): 0.1})
    assert set(joint.within(depth=2, ranks=1).accuracies) == {(0,), (0, 0)}
    assert joint.within(depth=3, ranks=None).accuracies == joint.accuracies


@pytest.mark.parametrize("nodes", [-1, 0, 7])
def test_more_nodes_than_there_are_is_refused(nodes: int) -> None:
    half = IndependentHeads(torch.full((2, 2), 0.5))
    assert half.available == available_nodes(heads=2, ranks=2) == 6
    with pytest.raises(ValueError, match=f"^medusa_tree: the calibrated ranks give .* 1 to 6 nodes, not {nodes};"):
        best_first(half, nodes)
    assert len(best_first(half, 6)) == 7


@pytest.mark.parametrize("table", [[[0.5, 1.5]], [[-0.1]], [[float("nan")]], [0.5]])
def test_accuracies_that_are_no_probabilities_are_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"^medusa_tree: the calibrated accuracies must be"):
        IndependentHeads(torch.tensor(table))
