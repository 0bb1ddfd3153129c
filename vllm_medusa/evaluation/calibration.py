# SPDX-License-Identifier: Apache-2.0
"""Grow trees from the heads' accuracies, and write both into the heads' checkpoint for serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.checkpoint.format import CONFIG_FILE
from vllm_medusa.files import read_json, write_json
from vllm_medusa.tree.static import (
    MAX_NODES,
    StaticTree,
    available_nodes,
    best_first,
    chain,
    expected_acceptance_length,
    path_probabilities,
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The best trees for given accuracies.

    Attributes:
        accuracies: ``[heads, ranks]``, float32: the probability that a head's token of a rank is the target's.
        largest: the largest tree; its prefixes are the best smaller trees.

    """

    accuracies: torch.Tensor
    largest: StaticTree

    @classmethod
    def of(cls, accuracies: Sequence[Sequence[float]], nodes: int) -> Calibration:
        """Grow the best tree of ``nodes`` nodes, or of fewer if the accuracies do not give so many."""
        table = torch.tensor(accuracies)
        available = min(MAX_NODES, available_nodes(*table.shape))
        return cls(table, best_first(table, min(nodes, available)))

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
        return list(accumulate(path_probabilities(self.largest, self.accuracies), initial=1.0))[1:]

    @property
    def expected_length_of_chain(self) -> float:
        """The expected acceptance length of the chain, which has each head's most probable token."""
        return expected_acceptance_length(chain(len(self.accuracies)), self.accuracies)


def write_calibration(directory: Path, calibration: Calibration, nodes: int | None) -> None:
    """Write accuracies and tree into the heads' ``config.json``, atomically.

    Args:
        directory: the heads' checkpoint.
        calibration: the accuracies and trees.
        nodes: the size of the tree that is served by default. With None, vLLM grows a tree of
            ``num_speculative_tokens`` nodes from the accuracies.

    Raises:
        ValueError: there is no tree of this size.
        OSError: the file cannot be written.

    """
    tree: str | list[list[int]] = "sparse" if nodes is None else calibration.tree(nodes).choices
    path = directory / CONFIG_FILE
    config: dict[str, Any] = read_json(path)
    config |= {"medusa_tree": tree, "medusa_accuracies": calibration.accuracies.tolist()}
    write_json(path, config)
