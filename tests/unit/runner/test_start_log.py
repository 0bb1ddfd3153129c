# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from vllm_medusa.runner.start_log import describe
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.options import Tree
from vllm_medusa.tree.static import cartesian, chain


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (chain(4), "chain of 4"),
        (cartesian([2, 2]), "tree of 6 nodes, 2 deep"),
        (DynamicTree(3, 7, 4, 0.0), "dynamic tree of at most 7 nodes"),
        (DynamicTree(3, 7, 4, 0.15), "dynamic tree of at most 7 nodes, paths of probability 0.15 and more"),
    ],
)
def test_a_tree_is_described_by_its_kind_and_size(tree: Tree, said: str) -> None:
    assert describe(tree) == said
