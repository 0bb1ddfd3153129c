"""From heads' accuracies to their trees, and into their checkpoint, where serving finds both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.checkpoint.format import CONFIG_FILE
from vllm_medusa.files import write_json
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
    """The trees that accuracies give.

    Attributes:
        accuracies: ``[heads, ranks]``, float32, as serving reads them: the probability that a head's token of a rank is
            the target's.
        largest: the best tree of most nodes that was asked for; its prefixes are the best smaller ones.

    """

    accuracies: torch.Tensor
    largest: StaticTree

    @classmethod
    def of(cls, accuracies: Sequence[Sequence[float]], nodes: int) -> Calibration:
        """Grow the best tree of ``nodes`` nodes, or of as many as the accuracies give.

        Raises:
            ValueError: the accuracies are no matrix of probabilities.

        """
        table = torch.tensor(accuracies)
        available = min(MAX_NODES, available_nodes(*table.shape))
        return cls(table, best_first(table, min(nodes, available)))

    def tree(self, nodes: int) -> StaticTree:
        """Return the best tree of ``nodes`` nodes.

        Raises:
            ValueError: the largest tree has fewer.

        """
        if not 1 <= nodes < len(self.largest):
            raise ValueError(
                f"nodes must be within 1..{len(self.largest) - 1}, what {len(self.accuracies)} heads of "
                f"{self.accuracies.shape[1]} ranks give, got {nodes}"
            )
        return self.largest.prefix(nodes + 1)

    @property
    def expected_lengths(self) -> list[float]:
        """The expected acceptance length of the best tree of 1, 2, ... nodes."""
        return list(accumulate(path_probabilities(self.largest, self.accuracies), initial=1.0))[1:]

    @property
    def expected_length_of_chain(self) -> float:
        """The expected acceptance length of the chain of all heads' most probable tokens."""
        return expected_acceptance_length(chain(len(self.accuracies)), self.accuracies)


def write_calibration(directory: Path, calibration: Calibration, nodes: int | None) -> None:
    """Put accuracies and tree into a heads' ``config.json``; a reader sees the old file or the new one.

    Args:
        directory: the heads' checkpoint; nothing else of it changes.
        calibration: what goes into it.
        nodes: the nodes of the tree that is served where the engine's options name none; None leaves the choice to
            serving, which grows a tree of ``num_speculative_tokens`` nodes from the accuracies.

    Raises:
        ValueError: there is no tree of so many nodes.
        OSError: the file cannot be written.

    """
    tree: str | list[list[int]] = "sparse" if nodes is None else calibration.tree(nodes).choices
    path = directory / CONFIG_FILE
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {"medusa_tree": tree, "medusa_accuracies": calibration.accuracies.tolist()}
    write_json(path, config)
