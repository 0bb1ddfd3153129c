# SPDX-License-Identifier: Apache-2.0
"""How far what followed a path earlier in a text is to be trusted (see ``tree.lookup``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_medusa.tree.lookup import LONGEST_MATCH, LOOKBACK

WEIGHTS = torch.linspace(0.01, 0.99, 99)
"""``[weights]``: those that are tried."""


@dataclass(frozen=True, eq=False)
class Matches:
    """The longest matches of the true paths along a text.

    Attributes:
        tokens: ``[length, heads]``, int64: what followed each match.
        lengths: ``[length, heads]``, int64: the matches' lengths, at most ``LONGEST_MATCH``; 0 where none is.

    """

    tokens: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(
        cls,
        text: torch.Tensor,  # [length], int64
        num_heads: int,
    ) -> Matches:
        """Look up the path that each head continues at each position, in the text up to its root."""
        size = len(text)
        same = text[:, None] == text
        by_end = torch.zeros(size, size, dtype=torch.int32, device=text.device)  # [path's end, match's end]
        for _ in range(LONGEST_MATCH):
            longer = torch.ones_like(by_end)
            longer[1:, 1:] += by_end[:-1, :-1]
            by_end = longer * same
        places = torch.arange(size, device=text.device)
        tokens, lengths = text.new_zeros(size, num_heads), text.new_zeros(size, num_heads)
        for head in range(min(num_heads, size - 1)):
            root = places[1 : size - head]
            in_window = (places - root[:, None] + LOOKBACK).clamp(min=0) * (places < root[:, None])
            best = (torch.minimum(by_end[head + 1 :], in_window) * size + places * (in_window > 0)).amax(dim=1)
            lengths[: len(root), head] = best // size
            tokens[: len(root), head] = text[(best % size + 1).clamp(max=size - 1)]
        return cls(tokens, lengths)


def best_weights(
    probabilities: torch.Tensor,  # [positions], float32
    followed: torch.Tensor,  # [positions], bool
    lengths: torch.Tensor,  # [positions], int64
) -> list[float]:
    """Return the weights w under which ``w + (1 - w) p_head`` is how often what followed matches is right.

    They are those of maximum likelihood. One match more that was right, and one that was wrong, keep rare lengths from
    the extremes.

    Args:
        probabilities: what the head gives to the label; 0 where it cannot draft it. It is read where the label is what
            followed the match.
        followed: whether the label is what followed the match.
        lengths: the matches' lengths.

    Returns:
        The weights of the lengths from 1 on; a length that the text does not have gets that of the shorter one.

    """
    weights: list[float] = []
    for length in range(1, LONGEST_MATCH + 1):
        at = lengths == length
        if not at.any():
            weights.append(weights[-1] if weights else 0.0)
            continue
        right = probabilities[at & followed, None]
        wrong = int((at & ~followed).sum())
        likelihood = (WEIGHTS + (1 - WEIGHTS) * right).log().sum(dim=0) + wrong * (1 - WEIGHTS).log()
        likelihood += WEIGHTS.log() + (1 - WEIGHTS).log()
        weights.append(round(float(WEIGHTS[likelihood.argmax()]), 2))
    return weights
