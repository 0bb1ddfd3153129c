# SPDX-License-Identifier: Apache-2.0
"""Medusa heads for training, in plain PyTorch; parameters are named as in the checkpoint."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_medusa.checkpoint.format import HeadsSpec


class ResidualLayers(nn.Module):
    """Layers ``x + SiLU(Linear(x))``; all weights start at zero, so the layers start as the identity."""

    def __init__(self, hidden_size: int, num_layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(num_layers))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + functional.silu(layer(hidden))
        return hidden


class TrainableHeads(nn.Module):
    """K heads: head k reads the target's hidden state at position t and predicts the token at t + 1 + k.

    Args:
        spec: the heads' sizes.
        lm_head: ``[vocab_size, hidden_size]``: the weight of the target's LM head. The heads' LM heads start as copies
            of it, so untrained heads predict what the target predicts. A shared LM head is not trained.

    """

    def __init__(self, spec: HeadsSpec, lm_head: torch.Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(
            ResidualLayers(spec.hidden_size, spec.num_layers, spec.fc_bias) for _ in range(spec.num_heads)
        )
        self.lm_heads = nn.ModuleList(
            nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
            for _ in range(1 if spec.shared_lm_head else spec.num_heads)
        )
        with torch.no_grad():
            for weight in self.lm_heads.parameters():
                weight.copy_(lm_head)
        self.lm_heads.requires_grad_(not spec.shared_lm_head)

    def logits(self, head: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[..., vocab_size]`` of one head, counted from 0.

        ``hidden`` are the target's hidden states after its final norm, ``[..., hidden_size]``.
        """
        lm_head = self.lm_heads[0 if self.spec.shared_lm_head else head]
        return lm_head(self.blocks[head](hidden))
