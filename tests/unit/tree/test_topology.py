# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic, trees
from vllm_medusa.step.trees import WORD_BITS
from vllm_medusa.tree.topology import DraftTree

WIDE = {"min_rows": 2 * WORD_BITS + 1, "max_rows": 2 * WORD_BITS + 40}


def climb(tree: DraftTree, row: int) -> list[int]:
    """The rows from ``row`` to the root, read off the parents one by one."""
    rows = [row]
    while rows[-1] != 0:
        rows.append(int(tree.parents[rows[-1]]))
    return rows


@deterministic
@given(trees() | trees(**WIDE))
def test_depths_and_ancestors_are_what_climbing_to_the_root_finds(tree: DraftTree) -> None:
    for row in range(len(tree)):
        climbed = climb(tree, row)
        assert tree.ancestors[row].nonzero().flatten().tolist() == sorted(climbed)
        assert tree.depths[row] == len(climbed) - 1
    assert tree.depth == max(len(climb(tree, row)) for row in range(len(tree))) - 1


@deterministic
@given(trees(), st.data())
def test_every_prefix_is_a_tree_with_the_same_rows(tree: DraftTree, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, len(tree)))
    prefix = tree.prefix(rows)
    assert prefix.parents.tolist() == tree.parents.tolist()[:rows]
    assert torch.equal(prefix.ancestors, tree.ancestors[:rows, :rows])
    assert torch.equal(prefix.depths, tree.depths[:rows])


@deterministic
@given(trees())
def test_a_prefix_longer_than_the_tree_is_the_tree(tree: DraftTree) -> None:
    assert tree.prefix(len(tree)) is tree
    assert tree.prefix(len(tree) + 5) is tree


@deterministic
@given(trees(max_rows=5))
def test_a_tree_is_a_chain_exactly_if_its_mask_is_causal(tree: DraftTree) -> None:
    assert tree.is_chain == torch.equal(tree.ancestors, torch.ones(len(tree), len(tree)).tril().bool())


@pytest.mark.parametrize("depth", [0, 1, 7])
def test_a_chain_of_some_depth_is_causal(depth: int) -> None:
    tree = DraftTree.chain(depth)
    assert tree.is_chain
    assert tree.depths.tolist() == list(range(depth + 1))


@deterministic
@given(trees(min_rows=2), st.data())
def test_a_parent_that_comes_later_is_refused_by_its_row(tree: DraftTree, data: st.DataObject) -> None:
    row = data.draw(st.integers(1, len(tree) - 1))
    parents = tree.parents.tolist()
    parents[row] = data.draw(st.integers(-3, -1) | st.integers(row, row + 3))
    with pytest.raises(ValueError, match=rf"parents\[{row}\] .* 0\.\.{row - 1}, got {parents[row]}$"):
        DraftTree.from_parents(parents)


@pytest.mark.parametrize("parents", [[0], [0, 0], [-2, 0]])
def test_a_first_row_that_is_no_root_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match=r"parents\[0\] must be -1"):
        DraftTree.from_parents(parents)


@pytest.mark.parametrize(
    "parents",
    [torch.tensor([], dtype=torch.int64), torch.tensor([-1], dtype=torch.int32), torch.tensor([[-1]])],
)
def test_parents_that_are_not_a_filled_int64_vector_are_refused(parents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="non-empty int64 vector"):
        DraftTree(parents)
