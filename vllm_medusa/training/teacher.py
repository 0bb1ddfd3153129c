# SPDX-License-Identifier: Apache-2.0
"""The target's own distribution, from which heads may learn instead of from the text's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_medusa.training.target_logits import TargetLogits

TOP_TOKENS = 64
"""How many of the target's most probable tokens are kept of each position."""

LOG_PROBS_DTYPE = torch.float16
"""The dtype of log-probabilities, kept or not, so that both give the same losses; it holds three digits."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The target's most probable tokens after each position; position t has those for the token at t + 1.

    Attributes:
        tokens: ``[batch, length, tokens]``, int32: token ids, most probable first.
        log_probs: ``[batch, length, tokens]``, float16.

    """

    tokens: torch.Tensor
    log_probs: torch.Tensor


def num_top_tokens(vocab_size: int) -> int:
    """Return how many tokens are kept of each position."""
    return min(TOP_TOKENS, vocab_size)


class Teacher:
    """Computes a target's ``TopTokens`` from its hidden states; only ``chunk_size`` positions' logits are in memory."""

    def __init__(self, logits: TargetLogits, chunk_size: int) -> None:
        self._logits = logits
        self._chunk_size = chunk_size

    @torch.no_grad()
    def __call__(
        self,
        hidden: torch.Tensor,  # [batch, length, hidden_size]
    ) -> TopTokens:
        """Return the target's most probable tokens after each of these states."""
        kept = num_top_tokens(len(self._logits.lm_head.weight))
        tokens = torch.empty((*hidden.shape[:2], kept), dtype=torch.int32, device=hidden.device)
        log_probs = torch.empty(tokens.shape, dtype=LOG_PROBS_DTYPE, device=hidden.device)
        chunks = (each.flatten(0, 1).split(self._chunk_size) for each in (hidden, tokens, log_probs))
        for states, chunk_tokens, chunk_log_probs in zip(*chunks, strict=True):
            logits = self._logits(states).float()
            best = logits.topk(kept, dim=-1)
            chunk_tokens.copy_(best.indices)
            chunk_log_probs.copy_(best.values - logits.logsumexp(dim=-1, keepdim=True))
        return TopTokens(tokens, log_probs)
