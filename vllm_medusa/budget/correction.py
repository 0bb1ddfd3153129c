# SPDX-License-Identifier: Apache-2.0
"""The heads' probabilities, corrected by what was accepted of late."""

from __future__ import annotations

import numpy as np
import torch

HORIZON = 256
"""Steps after which an earlier one counts a third."""

PRIOR = 4.0
"""Accepted tokens, as expected, that are taken as seen beforehand. What has not been verified for long returns to the
heads' own judgement, so that a depth that was judged too low once is tried again."""


class Correction:
    """For each depth the ratio of accepted nodes to those that the heads expected.

    Args:
        max_depth: the deepest node's depth.

    """

    def __init__(self, max_depth: int) -> None:
        self._expected = np.zeros(max_depth + 1)
        self._accepted = np.zeros(max_depth + 1)

    @property
    def ratios(self) -> np.ndarray:
        """``[max_depth + 1]``, float64, by depth."""
        return (self._accepted + PRIOR) / (self._expected + PRIOR)

    def observe(
        self,
        depths: np.ndarray,  # [nodes], int64
        probabilities: np.ndarray,  # [nodes], float32
        accepted: np.ndarray,  # [nodes], bool
    ) -> None:
        """Note which of a step's verified nodes were accepted.

        Args:
            depths: of the nodes.
            probabilities: as the heads said, uncorrected.
            accepted: which of them were.

        """
        for total, weights in ((self._expected, probabilities), (self._accepted, accepted)):
            total *= 1 - 1 / HORIZON
            total += np.bincount(depths, weights, minlength=len(total))

    def apply(
        self,
        probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32
        depths: torch.Tensor,  # [num_reqs, num_nodes], int64
    ) -> torch.Tensor:  # [num_reqs, num_nodes], float32
        """Return the corrected probabilities, made to fall along each request."""
        corrected = np.minimum(probabilities.numpy() * self.ratios[depths.numpy()], 1)
        return torch.from_numpy(np.minimum.accumulate(corrected, axis=1, dtype=np.float32))
