# SPDX-License-Identifier: Apache-2.0
"""Grow trees from what was measured of the heads, and write it into the heads' checkpoint for serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.checkpoint.entries import path_name
from vllm_medusa.checkpoint.format import CONFIG_FILE
from vllm_medusa.files import read_json, write_json
from vllm_medusa.tree.best_first import (
    IndependentHeads,
    JointPaths,
    PathAccuracies,
    best_first,
    expected_acceptance_length,
    path_probabilities,
)
from vllm_medusa.tree.static import MAX_NODES, StaticTree, chain

MOST_PATHS = 256
"""Paths whose shares are written; a larger tree grows from the accuracies of each head."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The best trees for what was measured.

    Attributes:
        accuracies: ``[heads, ranks]``, float32: the probability that a head's token of a rank is the target's.
        paths: how often paths are right as a whole; None if the text shows too few of them to grow trees from.
        temperatures: ``[heads]``: by which logits are divided where scores are read.
        lookup_weights: ``[heads][match lengths]``: how far what followed a path before is trusted; None if it is not
            drafted.
        largest: the largest tree; its prefixes are the best smaller trees.

    """

    accuracies: torch.Tensor
    paths: JointPaths | None
    temperatures: Sequence[float]
    lookup_weights: Sequence[Sequence[float]] | None
    largest: StaticTree

    @classmethod
    def of(
        cls,
        accuracies: Sequence[Sequence[float]],
        paths: JointPaths,
        temperatures: Sequence[float],
        lookup_weights: Sequence[Sequence[float]] | None,
        nodes: int,
    ) -> Calibration:
        """Grow the best tree of ``nodes`` nodes, or of fewer if the accuracies do not give so many."""
        independent = IndependentHeads(torch.tensor(accuracies))
        nodes = min(nodes, MAX_NODES, independent.available)
        joint = paths if paths.available >= nodes else None
        largest = best_first(joint or independent, nodes)
        return cls(independent.accuracies, joint, temperatures, lookup_weights, largest)

    @property
    def source(self) -> PathAccuracies:
        """What trees are grown from."""
        return self.paths or IndependentHeads(self.accuracies)

    def tree(self, nodes: int) -> StaticTree:
        """Return the best tree of ``nodes`` nodes; raises ``ValueError`` if the largest tree has fewer."""
        if not 1 <= nodes < len(self.largest):
            raise ValueError(
                f"nodes must be within 1..{len(self.largest) - 1} for {len(self.accuracies)} heads of "
                f"{self.accuracies.shape[1]} ranks, got {nodes}"
            )
        return self.largest.prefix(nodes + 1)

    @property
    def expected_lengths(self) -> list[float]:
        """The expected acceptance length of the best tree of 1, 2, ... nodes."""
        return list(accumulate(path_probabilities(self.largest, self.source), initial=1.0))[1:]

    @property
    def expected_length_of_chain(self) -> float:
        """The expected acceptance length of the chain, which has each head's most probable token."""
        return expected_acceptance_length(chain(len(self.accuracies)), self.source)

    def entries(self, nodes: int | None) -> dict[str, Any]:
        """Return the entries of ``config.json``; see ``write_calibration``."""
        entries: dict[str, Any] = {
            "medusa_tree": "sparse" if nodes is None else self.tree(nodes).choices,
            "medusa_accuracies": self.accuracies.tolist(),
            "medusa_temperatures": list(self.temperatures),
        }
        if self.lookup_weights is not None:
            entries["medusa_lookup_weights"] = list(map(list, self.lookup_weights))
        if self.paths is not None:
            frequent = best_first(self.paths, min(MOST_PATHS, self.paths.available))
            shares = zip(map(path_name, frequent.choices), path_probabilities(frequent, self.paths), strict=True)
            entries["medusa_path_accuracies"] = dict(shares)
        return entries


def write_calibration(directory: Path, calibration: Calibration, nodes: int | None) -> None:
    """Write accuracies, temperatures and tree into the heads' ``config.json``, atomically.

    Args:
        directory: the heads' checkpoint.
        calibration: what was measured.
        nodes: the size of the tree that is served by default. With None, vLLM grows a tree of
            ``num_speculative_tokens`` nodes from the accuracies.

    Raises:
        ValueError: there is no tree of this size.
        OSError: the file cannot be written.

    """
    path = directory / CONFIG_FILE
    config: dict[str, Any] = read_json(path)
    for name in ("medusa_path_accuracies", "medusa_lookup_weights"):
        config.pop(name, None)  # Of another measurement.
    write_json(path, config | calibration.entries(nodes))
