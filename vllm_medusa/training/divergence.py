# SPDX-License-Identifier: Apache-2.0
"""The divergence of an LM head's predictions from what they should be, in chunks of positions.

Loss and gradients are computed together, so that no chunk's logits are kept or computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.autograd.function import Function, FunctionCtx

from vllm_medusa.data.packing import IGNORED

LEAST_TAIL = 1e-5
"""The least probability that predictions are taken to leave to the tail, since in float32 it is a difference."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What is expected at some positions: a few tokens, and one outcome, the tail, for all others together.

    A label is one token of probability 1; the divergence from it is the cross-entropy. Tokens without a row are left
    out: the divergence is that from the distribution of the others, times their probability. So it is what labels
    drawn from the expected distribution give on average, if those without a row are ignored.

    Attributes:
        rows: ``[positions, tokens]``, int64: the tokens' rows in the LM head; ``IGNORED`` for those without one.
        probabilities: ``[positions, tokens]``, float32. What they lack to 1 is the tail's.
        weights: ``[positions]``, float32: the positions' weights in a sum of divergences.

    """

    rows: torch.Tensor
    probabilities: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def labels(cls, rows: torch.Tensor, weight: float) -> Expected:
        """Expect one token at each position; ``rows`` is ``[positions]`` and holds no ``IGNORED``."""
        ones = torch.ones(len(rows), device=rows.device)
        return cls(rows[:, None], ones[:, None], weight * ones)

    @classmethod
    def cat(cls, parts: Sequence[Expected]) -> Expected:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def linear_divergence(
    states: torch.Tensor,
    expected: Expected,
    lm_head: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Return ``sum_i weights_i KL(expected_i || softmax(lm_head states_i))``, a scalar in float32.

    Args:
        states: ``[positions, hidden_size]``.
        expected: of as many positions.
        lm_head: ``[rows, hidden_size]``.
        chunk_size: positions whose logits are in memory at the same time.

    """
    return _LinearDivergence.apply(states, lm_head, expected, chunk_size)


class _LinearDivergence(Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        lm_head: torch.Tensor,
        expected: Expected,
        chunk_size: int,
    ) -> torch.Tensor:
        weights = expected.weights
        wants_states, wants_lm_head = ctx.needs_input_grad[:2]
        dtype = _product_dtype(lm_head)
        total = states.new_zeros((), dtype=torch.float32)
        of_states = torch.empty_like(states) if wants_states else None
        of_lm_head = torch.zeros_like(lm_head) if wants_lm_head else None
        # Factors of at most 1 stay within fp16's range. Read once: it waits for the device.
        scale = float(weights.max()) if wants_lm_head and len(weights) else 1.0
        with torch.autocast(states.device.type, enabled=False):
            matrix = lm_head.to(dtype)
            for start in range(0, len(states), chunk_size):
                chunk = slice(start, start + chunk_size)
                inputs, factors = states[chunk].to(dtype), weights[chunk, None]
                log_probs = (inputs @ matrix.T).float().log_softmax(dim=-1)
                losses, gradient = _divergence(log_probs, expected.rows[chunk], expected.probabilities[chunk])
                total += weights[chunk] @ losses
                gradient = gradient.to(dtype)
                if of_states is not None:
                    of_states[chunk] = (gradient @ matrix).float() * factors
                if of_lm_head is not None:
                    scaled = inputs * (factors / scale).to(dtype)
                    if dtype == lm_head.dtype:
                        of_lm_head.addmm_(gradient.T, scaled, alpha=scale)
                    else:
                        of_lm_head.add_(gradient.T @ scaled, alpha=scale)
        ctx.save_for_backward(of_states, of_lm_head)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients that ``forward`` has computed."""
        (of_loss,) = outputs
        gradients = (None if each is None else each * of_loss for each in ctx.saved_tensors)  # type: ignore[attr-defined]
        return (*gradients, None, None)


def _product_dtype(lm_head: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply here."""
    device = lm_head.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm_head.dtype


def _divergence(
    log_probs: torch.Tensor,  # [positions, rows of the LM head], overwritten
    rows: torch.Tensor,  # [positions, tokens]
    probabilities: torch.Tensor,  # [positions, tokens]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergences, ``[positions]``, and their gradients by the logits, shaped as these.

    With p for what is expected, q for the predictions, T for the tail and m for the sum of all p that have a row, the
    divergence is ``sum_i p_i log(p_i / (m q_i)) + p_T log(p_T / (m q_T))``, and its gradient ``m q_i - p_i`` for a
    token that is expected and ``q_i (m - p_T / q_T)`` for one of the tail.
    """
    named = rows != IGNORED
    rows = rows.clamp(min=0)
    p = probabilities * named
    log_q = log_probs.gather(1, rows)
    q = log_q.exp() * named
    p_tail = (1 - probabilities.sum(dim=1)).clamp(min=0)
    q_tail = (1 - q.sum(dim=1)).clamp(min=LEAST_TAIL)
    share, mass = p_tail / q_tail, p.sum(dim=1) + p_tail
    losses = (torch.xlogy(p, p) - p * log_q).sum(dim=1) + torch.xlogy(p_tail, share) - torch.xlogy(mass, mass)
    gradient = log_probs.exp_().mul_((mass - share)[:, None])
    return losses, gradient.scatter_add_(1, rows, q * share[:, None] - p)
