# SPDX-License-Identifier: Apache-2.0
"""What followed the same tokens before: a candidate out of the request's own text, beside those of the heads.

Answers repeat words and phrases of their questions and of themselves. Heads see one hidden state and cannot copy;
prompt lookup (vLLM's method "ngram") can do nothing else. Here both speak of each node: its path is looked up in the
text, and what followed the longest match there is a child of weight w, which matches of that length have earned on
held-out text: ``p(token) = (1 - w) p_head(token) + w [token followed the match]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from vllm_medusa.tree.drafts import NO_TOKEN
from vllm_medusa.tree.levels import Asked, LevelHeads

LOOKBACK = 2048
"""The last tokens of a text in which paths are looked up."""

LONGEST_MATCH = 8
"""Tokens of a path and the text before it that are compared; longer matches count as this long."""

MERGED = 4
"""A head's first tokens that may be what followed the match: the weights of both then add up."""


class LookupHeads:
    """Heads as ``LevelHeads`` that also draft what followed the path before.

    Args:
        heads: heads that have not been asked yet.
        text: ``[num_reqs, length]``: see ``last_tokens``.
        weights: ``[heads, LONGEST_MATCH + 1]``, float32: the weight of a match by its length, 0 for none.
        vocab_size: tokens that the target can read. A text may hold others, in the place of images, which are not
            drafted.

    """

    def __init__(self, heads: LevelHeads, text: torch.Tensor, weights: torch.Tensor, vocab_size: int) -> None:
        self._heads, self._weights, self._vocab_size = heads, weights, vocab_size
        # A path is aligned with the text where its root is; with these places before it, every other node fits too.
        self._text = pad(text, (len(weights), 0), value=NO_TOKEN)
        self._places = torch.arange(self._text.shape[1], device=text.device, dtype=torch.int32)
        self._lengths = _lengths_at_root(self._text)[:, None]
        self._level = 0

    def top_tokens(self, asked: Asked, top_k: int) -> torch.Tensor:
        """Ask the next head (see ``LevelHeads``)."""
        return self.top_predictions(asked, top_k)[1]

    def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the next head, and look the nodes up (see ``LevelHeads``)."""
        log_probs, tokens = self._heads.top_predictions(asked, max(top_k, MERGED))
        found, lengths = self._look_up(asked)
        weights = self._weights[self._level][lengths].masked_fill(found >= self._vocab_size, 0)
        self._level += 1
        return mixed(log_probs, tokens, found, weights, top_k)

    def _look_up(self, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what followed the nodes' longest match, the last one of these, and its length, int64, as nodes are."""
        text, level, size = self._text, self._level, self._text.shape[1]
        if asked.parents is not None:
            parents = asked.parents[:, :, None].expand(-1, -1, size - level)
            longer = (self._lengths.gather(1, parents) + 1).clamp(max=LONGEST_MATCH)
            self._lengths = longer * (text[:, None, level:] == asked.tokens[:, :, None])
        followed = self._lengths[:, :, : size - level - 1]
        # A longer match is better, then a later one.
        best = torch.add(self._places[: size - level - 1], followed, alpha=size).amax(dim=2).long()
        return text.gather(1, best % size + level + 1).long(), best // size


def _lengths_at_root(
    text: torch.Tensor,  # [num_reqs, length], int32
) -> torch.Tensor:
    """Return how many tokens up to each place are those up to the text's end, ``[num_reqs, length]``, int32."""
    windows = pad(text, (LONGEST_MATCH - 1, 0), value=NO_TOKEN).unfold(1, LONGEST_MATCH, 1)
    same = (windows == windows[:, -1:]) & (windows != NO_TOKEN)
    return same.flip(dims=(2,)).cumprod(dim=2, dtype=torch.int32).sum(dim=2, dtype=torch.int32)


def mixed(
    log_probs: torch.Tensor,  # [..., tokens], float32
    tokens: torch.Tensor,  # [..., tokens], int64
    found: torch.Tensor,  # [...], int64
    weights: torch.Tensor,  # [...], float32, below 1
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix what heads say with what was found.

    Args:
        log_probs: of the heads' most probable tokens, best first.
        tokens: these.
        found: what followed a match; any token where the weight is 0.
        weights: how far to trust it.
        top_k: how many to return.

    Returns:
        The most probable tokens' log-probabilities, and the tokens, ``[..., top_k]`` both, best first.

    """
    of_heads = log_probs + torch.log1p(-weights)[..., None]
    same = tokens == found[..., None]
    said = of_heads.masked_fill(~same, -torch.inf).amax(dim=-1)
    of_match = torch.logaddexp(said, weights.log())
    both = torch.cat([of_heads.masked_fill(same, -torch.inf), of_match[..., None]], dim=-1)
    best, order = both.topk(top_k)
    return best, torch.cat([tokens, found[..., None]], dim=-1).gather(-1, order)


def last_tokens(
    tokens: torch.Tensor,  # [rows, most tokens], int32
    rows: torch.Tensor,  # [num_reqs], int64
    lengths: torch.Tensor,  # [num_reqs], int64
    length: int,
) -> torch.Tensor:
    """Return the end of each request's text.

    Args:
        tokens: texts, each from the beginning of its row.
        rows: the requests' rows.
        lengths: tokens that are known of each request's text, the last one its root.
        length: how many to return.

    Returns:
        ``[num_reqs, length]``, int32, the root last, ``NO_TOKEN`` before a text begins.

    """
    places = lengths[:, None] - length + torch.arange(length, device=tokens.device)
    found = tokens[rows[:, None], places.clamp(min=0)]
    return found.masked_fill(places < 0, NO_TOKEN)


def weights_tensor(stored: Sequence[Sequence[float]]) -> torch.Tensor:
    """Return ``LookupHeads``'s weights from those of a checkpoint, ``[heads][match lengths]`` from 1 on."""
    weights = torch.zeros(len(stored), LONGEST_MATCH + 1, dtype=torch.float32)
    for head, of_lengths in enumerate(stored):
        by_length = torch.tensor(of_lengths)
        places = torch.arange(LONGEST_MATCH).clamp(max=len(by_length) - 1)  # The last is of all that are longer.
        weights[head, 1:] = by_length[places]
    return weights
