# SPDX-License-Identifier: Apache-2.0
"""The heads' probabilities, corrected by what was accepted of late."""

from __future__ import annotations

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
        self._expected = torch.zeros(max_depth + 1)
        self._accepted = torch.zeros(max_depth + 1)

    @property
    def ratios(self) -> torch.Tensor:
        """``[max_depth + 1]``, float32, by depth."""
        return (self._accepted + PRIOR) / (self._expected + PRIOR)

    def observe(
        self,
        depths: torch.Tensor,  # [nodes], int64
        probabilities: torch.Tensor,  # [nodes], float32
        accepted: torch.Tensor,  # [nodes], bool
    ) -> None:
        """Note which of a step's verified nodes were accepted.

        Args:
            depths: of the nodes.
            probabilities: as the heads said, uncorrected.
            accepted: which of them were.

        """
        for total, weights in ((self._expected, probabilities), (self._accepted, accepted.float())):
            total *= 1 - 1 / HORIZON
            total += torch.bincount(depths, weights, minlength=len(total))

    def apply(
        self,
        probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32
        depths: torch.Tensor,  # [num_reqs, num_nodes], int64
    ) -> torch.Tensor:  # [num_reqs, num_nodes], float32
        """Return the corrected probabilities, made to fall along each request."""
        return (probabilities * self.ratios[depths]).clamp(max=1).cummin(dim=1).values
