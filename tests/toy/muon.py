# SPDX-License-Identifier: Apache-2.0
"""The Muon optimizer (https://kellerjordan.github.io/posts/muon) in fp32, for CPUs without bf16 arithmetic.

``torch.optim.Muon`` orthogonalises in bf16, which is several times slower on such CPUs. In a few minutes of training,
Muon reaches a much lower loss than AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the weight matrices of hidden layers."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for param in params:
            groups.setdefault(param.shape, []).append(param)
        super().__init__(
            [{"params": group} for group in groups.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            gradient = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            updates = orthogonalise(gradient.lerp_(momentum, group["momentum"]))
            scale = max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5
            for param, update in zip(params, updates, strict=True):
                param.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of ``[batch, rows, columns]`` near 1 by Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
