# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.static import StaticTree, cartesian, chain, from_choices, validate_depth
from vllm_medusa.tree.topology import DraftTree

Path = tuple[int, ...]


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
    assert prefix.log_probs is None
    log_probs = torch.arange(tree.num_nodes, dtype=torch.float32)
    judged = replace(tree, log_probs=log_probs).prefix(rows).log_probs
    assert judged is not None
    assert torch.equal(judged, log_probs[: rows - 1])


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


def test_a_tree_deeper_than_the_heads_is_refused_by_its_first_path_that_is_too_long() -> None:
    tree = from_choices([[0], [0, 1], [0, 0], [0, 1, 5], [0, 0, 0]])
    validate_depth(tree, num_heads=3)
    with pytest.raises(ValueError, match=r"^medusa_tree: path \[0, 1, 5\] is 3 deep, but there are 2 heads;"):
        validate_depth(tree, num_heads=2)


@pytest.mark.parametrize("ranks", [torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_ranks_that_do_not_fit_the_rows_are_refused(ranks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="ranks must be an int64 vector of 2 rows"):
        StaticTree(DraftTree.chain(1), ranks)
