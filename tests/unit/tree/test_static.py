# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.static import (
    StaticTree,
    available_nodes,
    best_first,
    cartesian,
    chain,
    expected_acceptance_length,
    from_choices,
    path_probabilities,
    validate_depth,
)
from vllm_medusa.tree.topology import DraftTree

Path = tuple[int, ...]


@st.composite
def accuracies(draw: st.DrawFn) -> torch.Tensor:
    """``[heads, ranks]`` with at most 14 nodes below the root."""
    heads, ranks = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (4, 1)]))
    cell = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    rows = draw(st.lists(st.lists(cell, min_size=ranks, max_size=ranks), min_size=heads, max_size=heads))
    return torch.tensor(rows, dtype=torch.float64)


def all_paths(heads: int, ranks: int) -> list[Path]:
    return [path for depth in range(heads) for path in product(range(ranks), repeat=depth + 1)]


def path_product(path: Path | list[int], rows: list[list[float]]) -> float:
    return prod(rows[depth][rank] for depth, rank in enumerate(path))


@st.composite
def path_sets(draw: st.DrawFn) -> list[list[int]]:
    """Paths that form a tree, in any order."""
    leaves = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6))
    paths = sorted({tuple(leaf[: end + 1]) for leaf in leaves for end in range(len(leaf))})
    return [list(path) for path in draw(st.permutations(paths))]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_chain_is_the_top_token_of_each_head(depth: int) -> None:
    tree = chain(depth)
    assert tree.choices == [[0] * length for length in range(1, depth + 1)]
    assert tree.topology.is_chain
    assert (tree.depth, tree.top_k, len(tree)) == (depth, 1, depth + 1)


@deterministic
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_cartesian_tree_has_every_path_within_the_widths_and_no_other(widths: list[int]) -> None:
    tree = cartesian(widths)
    expected = {path for depth in range(len(widths)) for path in product(*map(range, widths[: depth + 1]))}
    assert len(tree.choices) == len(expected)
    assert set(map(tuple, tree.choices)) == expected
    assert (tree.depth, tree.top_k) == (len(widths), max(widths))
    likely_first = [(sum(path) + len(path), len(path), path) for path in tree.choices]
    assert likely_first == sorted(likely_first)


def test_a_cartesian_tree_starts_with_shallow_paths_of_low_ranks() -> None:
    assert cartesian([3, 2]).choices == [[0], [1], [0, 0], [2], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


@deterministic
@given(path_sets())
def test_explicit_paths_keep_their_order_if_parents_come_first_else_are_sorted_by_depth(
    choices: list[list[int]],
) -> None:
    parent_first = all(path[:-1] in [[], *choices[:index]] for index, path in enumerate(choices))
    assert from_choices(choices).choices == (choices if parent_first else sorted(choices, key=len))


@deterministic
@given(path_sets())
def test_the_paths_of_a_tree_give_the_tree_back(choices: list[list[int]]) -> None:
    tree = from_choices(choices)
    again = from_choices(tree.choices)
    assert torch.equal(again.ranks, tree.ranks)
    assert torch.equal(again.topology.parents, tree.topology.parents)
    assert tree.depth == max(map(len, choices))
    assert tree.top_k == max(map(max, choices)) + 1


@deterministic
@given(path_sets(), st.data())
def test_a_prefix_is_the_first_paths(choices: list[list[int]], data: st.DataObject) -> None:
    tree = from_choices(choices)
    rows = data.draw(st.integers(1, len(tree) + 2))
    prefix = tree.prefix(rows)
    assert prefix.choices == tree.choices[: rows - 1]
    assert prefix.ranks.shape == prefix.topology.parents.shape


@settings(deterministic, max_examples=60)
@given(accuracies(), st.data())
def test_best_first_has_the_largest_sum_of_path_products(table: torch.Tensor, data: st.DataObject) -> None:
    paths = all_paths(*table.shape)
    nodes = data.draw(st.integers(1, min(len(paths), 7)))
    tree = best_first(table, nodes)
    assert len(tree) == nodes + 1
    rows = table.tolist()
    value = {path: path_product(path, rows) for path in paths}
    every_tree = (some for some in combinations(paths, nodes) if all(p[:-1] in ((), *some) for p in some))
    best = max(sum(value[path] for path in some) for some in every_tree)
    assert sum(value[tuple(path)] for path in tree.choices) == pytest.approx(best)


@deterministic
@given(accuracies(), st.data())
def test_a_prefix_of_best_first_is_the_smaller_best_first(table: torch.Tensor, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, len(all_paths(*table.shape))))
    fewer = data.draw(st.integers(1, nodes))
    assert best_first(table, nodes).prefix(fewer + 1).choices == best_first(table, fewer).choices


@deterministic
@given(accuracies(), st.data())
def test_a_node_is_accepted_with_the_product_of_its_paths_accuracies(table: torch.Tensor, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, available_nodes(*table.shape)))
    tree = best_first(table, nodes)
    expected = [path_product(path, table.tolist()) for path in tree.choices]
    assert path_probabilities(tree, table) == expected
    assert expected_acceptance_length(tree, table) == pytest.approx(1 + sum(expected))


def test_the_expected_acceptance_length_is_that_of_independent_heads() -> None:
    """Each outcome's tokens, weighted: head 1 right with its first or second token, head 2 below the first."""
    table = torch.tensor([[0.5, 0.25], [0.5, 0.0]], dtype=torch.float64)
    tree = from_choices([[0], [1], [0, 0]])
    assert expected_acceptance_length(tree, table) == 0.25 * 1 + 0.25 * 2 + 0.25 * 2 + 0.25 * 3


def test_best_first_goes_as_deep_as_the_accuracies_are_worth() -> None:
    tree = best_first(torch.tensor([[0.6, 0.2], [0.5, 0.3]]), 5)
    assert tree.choices == [[0], [0, 0], [1], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], r"the list of paths is empty"),
        ([[0], [1], [0]], r"path \[0\] is listed twice"),
        ([[0], [0, 3], [1], [0, 3]], r"path \[0, 3\] is listed twice"),
        ([[0], [1, 2]], r"path \[1, 2\] has no parent; .* add \[1\]"),
        ([[0], [0, 0, 1]], r"path \[0, 0, 1\] has no parent; .* add \[0, 0\]"),
        ([[0], []], r"\[\] is not a path"),
        ([[0], [0, -1]], r"\[0, -1\] is not a path"),
        ([[0], [0, 1.0]], r"\[0, 1.0\] is not a path"),
        ([[0], [True]], r"\[True\] is not a path"),
        ([[0], ["1"]], r"\['1'\] is not a path"),
        ([[0], 1], r"1 is not a path"),
        ([[0], "1"], r"'1' is not a path"),
    ],
)
def test_wrong_paths_are_refused_in_one_line_by_name(choices: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"^medusa_tree: {message}") as error:
        from_choices(choices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("widths", [[], [0], [4, 0, 2], [4, -1], [2, 1.5], [True], ["2"]])
def test_widths_that_are_not_positive_integers_are_refused(widths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^medusa_tree: \[.*\] is not a Cartesian product; .* at least 1"):
        cartesian(widths)


def test_a_chain_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^medusa_tree: a chain of depth 0"):
        chain(0)


@pytest.mark.parametrize("nodes", [-1, 0, 7])
def test_more_nodes_than_there_are_is_refused(nodes: int) -> None:
    with pytest.raises(ValueError, match=f"^medusa_tree: 2 heads of 2 .* 1 to 6 nodes, not {nodes};"):
        best_first(torch.full((2, 2), 0.5), nodes)
    assert len(best_first(torch.full((2, 2), 0.5), 6)) == 7


@pytest.mark.parametrize("table", [[[0.5, 1.5]], [[-0.1]], [[float("nan")]], [0.5]])
def test_accuracies_that_are_no_probabilities_are_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"^medusa_tree: the calibrated accuracies must be"):
        best_first(torch.tensor(table), 1)


def test_a_tree_deeper_than_the_heads_is_refused_by_its_first_path_that_is_too_long() -> None:
    tree = from_choices([[0], [0, 1], [0, 0], [0, 1, 5], [0, 0, 0]])
    validate_depth(tree, num_heads=3)
    with pytest.raises(ValueError, match=r"^medusa_tree: path \[0, 1, 5\] is 3 deep, but there are 2 heads;"):
        validate_depth(tree, num_heads=2)


@pytest.mark.parametrize("ranks", [torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_ranks_that_do_not_fit_the_rows_are_refused(ranks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="ranks must be an int64 vector of 2 rows"):
        StaticTree(DraftTree.chain(1), ranks)
