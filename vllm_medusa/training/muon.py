# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum whose singular values are made equal, for the heads' matrices (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW

MOMENTUM = 0.95

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton and Schulz's iteration, ``a x + (b x x' + c (x x')^2) x``, as in ``torch.optim.Muon``."""

ITERATIONS = 5

ADAMW_RMS = 0.2
"""The root mean square of AdamW's updates, to which Muon's are scaled, so that both take the same learning rates
(arXiv 2502.16982, section 2.2)."""


class Muon(AdamW):
    """Muon for the parameter groups with ``orthogonal`` True, which hold matrices, and AdamW for the others.

    ``torch.optim.Muon`` takes matrices alone and multiplies in bf16, which takes seconds a step on CPUs without such
    instructions. Here products are in the parameters' dtype, and those of matrices of one shape are one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients; those of matrices are gone afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("orthogonal", False):
                self._update_matrices(group)
        super().step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[matrix.shape].append(matrix)
        for shape, matrices in by_shape.items():
            updates = orthogonal(torch.stack([self._momentum(matrix) for matrix in matrices]))
            length = group["lr"] * ADAMW_RMS * max(shape) ** 0.5
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-length)
                matrix.grad = None  # AdamW leaves it alone.

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return Nesterov's momentum of a matrix's gradient."""
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # ``AdamW.__setstate__`` looks for it.
            state["momentum"] = torch.zeros_like(matrix)
        state["step"] += 1
        momentum: torch.Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def orthogonal(
    matrices: torch.Tensor,  # [matrices, rows, columns]
) -> torch.Tensor:
    """Return matrices with the same singular vectors, whose singular values are about 1 (0.7 to 1.2)."""
    rows, columns = matrices.shape[1:]
    if rows > columns:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    result = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result
