# SPDX-License-Identifier: Apache-2.0
"""From the options that name a tree to the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.files import read_json
from vllm_medusa.messages import shortened, shortened_message
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.best_first import (
    IndependentHeads,
    JointPaths,
    PathAccuracies,
    best_first,
    path_probabilities,
)
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.static import RankPath, StaticTree, cartesian, chain, from_choices, validate_depth

PUBLISHED_ACCURACIES = (
    (0.560, 0.112, 0.055, 0.033, 0.020),
    (0.316, 0.108, 0.061, 0.043, 0.034),
    (0.201, 0.087, 0.060, 0.035, 0.034),
)
"""Accuracy of each rank, heads 1 to 3 of Vicuna-7B v1.3 (Medusa-1): what a sparse tree grows from when the checkpoint
holds no accuracies of its own."""

DYNAMIC_TOP_K = 10
"""Tokens of each head that a dynamic tree may use where the options name no number."""

NAMED_TREES = ("sparse", "dynamic", "chain")

DYNAMIC_BEAM = 4
"""Nodes of a depth that may have children, in a tree that is grown by level; each is a row for the LM head."""

Tree = StaticTree | DynamicTree | BeamTree


@dataclass(frozen=True)
class TreeOptions:
    """What a tree is built from.

    Attributes:
        num_heads: heads that draft, the deepest node's depth.
        vocab_size: how many tokens the heads can draft.
        accuracies: ``[heads][ranks]``, from which sparse trees grow; None takes published ones.
        path_accuracies: how often whole paths are right, from which sparse trees grow in place of ``accuracies`` where
            they are enough; None if they were not measured.
        num_nodes: most nodes, the root not counted; None leaves it to the tree.
        default_num_nodes: nodes of a sparse tree where ``num_nodes`` is None.
        top_k: most tokens of each head that a sparse or dynamic tree may use; None is no limit for sparse trees.
        min_probability: the least probability of a path of a dynamic tree; None leaves none out.
        by_level: whether what is drafted below a node depends on the path to it.

    """

    num_heads: int
    vocab_size: int
    accuracies: Sequence[Sequence[float]] | None
    num_nodes: int | None
    default_num_nodes: int
    top_k: int | None
    min_probability: float | None
    by_level: bool = False
    path_accuracies: Mapping[RankPath, float] | None = None

    def build(self, wanted: Any) -> Tree:
        """Build the tree that ``medusa_tree`` asks for, cut to ``num_nodes``.

        Args:
            wanted: "sparse" or None, "dynamic", "chain", a Cartesian product, explicit choices, or a JSON file's path.

        Raises:
            ValueError: ``wanted`` is none of these, or asks for more than the heads have.

        """
        if wanted == "dynamic":
            return self.dynamic()
        if isinstance(wanted, str) and wanted not in ("sparse", "chain"):
            return self.build(_read_tree(wanted))
        if self.min_probability is not None:
            raise ValueError(
                f'medusa_min_probability: {self.min_probability} is for medusa_tree "dynamic", but medusa_tree is '
                f'{wanted or "sparse"!r}; leave it out, or give "dynamic"'
            )
        if wanted is None or wanted == "sparse":
            tree = self._sparse()
        elif wanted == "chain":
            tree = chain(self.num_heads)
        elif not isinstance(wanted, list):
            raise ValueError(
                f'medusa_tree: {shortened(wanted)} is none of "sparse", "dynamic", "chain", a Cartesian product '
                "such as [4, 2, 2], explicit choices such as [[0], [0, 0], [1]], or a JSON file"
            )
        elif wanted and not isinstance(wanted[0], list):
            tree = cartesian(wanted)
        else:
            tree = from_choices(wanted)
        validate_depth(tree, self.num_heads)
        if tree.top_k > self.vocab_size:
            raise ValueError(
                f"medusa_tree: rank {tree.top_k - 1} is asked for, but the heads know {self.vocab_size} tokens; "
                "give smaller ranks"
            )
        return tree if self.num_nodes is None else tree.prefix(self.num_nodes + 1)

    def dynamic(self) -> DynamicTree | BeamTree:
        """Build the tree of the most probable paths, of the form that the heads need."""
        top_k = min(self.top_k or DYNAMIC_TOP_K, self.vocab_size)
        floor = self.min_probability or 0.0
        num_nodes = self.num_nodes or self.default_num_nodes
        if self.by_level:
            return BeamTree(self.num_heads, num_nodes, top_k, DYNAMIC_BEAM, floor)
        return DynamicTree(self.num_heads, num_nodes, top_k, floor)

    def judge(self, tree: Tree) -> Tree:
        """Return a tree whose drafts say how probable their paths are.

        Raises:
            ValueError: the accuracies, by which a static tree is judged, are no matrix of probabilities.

        """
        if not isinstance(tree, StaticTree):
            return tree
        return replace(tree, log_probs=torch.tensor(path_probabilities(tree, self.accuracies_of(tree))).log())

    def accuracies_of(self, tree: StaticTree) -> PathAccuracies:
        """Return by what a static tree is judged.

        Paths that were counted whole if all of the tree's were, else the heads' accuracies, of which the last head and
        rank stand for all beyond.

        Raises:
            ValueError: the accuracies are no matrix of probabilities.

        """
        joint = JointPaths(self.path_accuracies or {})
        if all(tuple(choice) in joint.accuracies for choice in tree.choices):
            return joint
        accuracies = self._accuracy_matrix()
        head = torch.arange(tree.depth).clamp(max=accuracies.shape[0] - 1)
        rank = torch.arange(tree.top_k).clamp(max=accuracies.shape[1] - 1)
        return IndependentHeads(accuracies[head][:, rank])

    def _accuracy_matrix(self) -> torch.Tensor:
        stored = self.accuracies or PUBLISHED_ACCURACIES
        try:
            accuracies = torch.tensor(stored)
            _, _ = accuracies.shape
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"medusa_accuracies: the heads' config.json holds {shortened(stored)}, which is no matrix "
                "[heads, ranks]; calibrate the heads again"
            ) from error
        return accuracies

    def _sparse(self) -> StaticTree:
        independent = IndependentHeads(self._accuracy_matrix()[: self.num_heads, : self.top_k])
        nodes = self.num_nodes or min(independent.available, self.default_num_nodes)
        joint = JointPaths(self.path_accuracies or {}).within(self.num_heads, self.top_k)
        return best_first(joint if joint.available >= nodes else independent, nodes)


def _read_tree(path: str) -> Any:
    """Read a tree from a JSON file: the tree itself, or an object that holds it as ``medusa_tree``."""
    try:
        stored = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f'medusa_tree: {path!r} is none of "sparse", "dynamic", "chain", a list, or a readable JSON file '
            f"({shortened_message(error)})"
        ) from error
    tree = stored["medusa_tree"] if isinstance(stored, dict) and "medusa_tree" in stored else stored
    if not isinstance(tree, list) and tree not in NAMED_TREES:
        raise ValueError(
            f'medusa_tree: {path!r} holds {shortened(tree)}; it must hold "sparse", "dynamic", "chain" or a list'
        )
    return tree
