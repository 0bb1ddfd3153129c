# SPDX-License-Identifier: Apache-2.0
"""The tokens that heads can draft, where these are not all of the target's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm_medusa.data.packing import IGNORED


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The most frequent tokens of a training text, of which only the labels count: heads predict nothing else.

    Attributes:
        tokens: ``[size]``, int64: different token ids, the most frequent first.

    """

    tokens: torch.Tensor

    @classmethod
    def most_frequent(cls, size: int, counts: torch.Tensor) -> DraftVocabulary:
        """Choose ``size`` tokens by their ``count_tokens``; of equally frequent ones, those with lower ids.

        Raises:
            ValueError: the target has no more tokens than that.

        """
        if size >= len(counts):
            raise ValueError(
                f"draft_vocab must be less than {len(counts)}, the size of the target's vocabulary, got {size}; leave "
                "it out to draft all tokens"
            )
        return cls(counts.argsort(descending=True, stable=True)[:size])

    def coverage(self, counts: torch.Tensor) -> float:
        """Return the share of the counted labels that can be drafted."""
        return int(counts[self.tokens].sum()) / max(1, int(counts.sum()))


def count_tokens(
    labels: Iterable[torch.Tensor],
    vocab_size: int,
) -> torch.Tensor:
    """Return ``[vocab_size]``, int64: how often each token is a label; ``labels`` are int64, of any shape."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for each in labels:
        counts += each[each != IGNORED].bincount(minlength=vocab_size)
    return counts
