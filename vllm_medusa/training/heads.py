# SPDX-License-Identifier: Apache-2.0
"""Medusa heads for training, in plain PyTorch; parameters are named as in the checkpoint."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.paths import PathTerm, normed


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
        token_map: ``[draft_vocab_size]``, int64: the tokens of the draft vocabulary, whose rows the LM heads take;
            None if the spec has none.
        embedding: ``[vocab_size, hidden_size]``: the target's input embedding, for heads that read paths.

    """

    token_map: torch.Tensor | None
    embedding: torch.Tensor | None

    def __init__(
        self,
        spec: HeadsSpec,
        lm_head: torch.Tensor,
        token_map: torch.Tensor | None = None,
        embedding: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("token_map", token_map)
        # The target's own: no part of the checkpoint.
        self.register_buffer("embedding", None if spec.path_rank is None else embedding, persistent=False)
        self.blocks = nn.ModuleList(
            ResidualLayers(spec.hidden_size, spec.num_layers, spec.fc_bias) for _ in range(spec.num_heads)
        )
        if spec.path_rank is not None:
            self.paths = nn.ModuleList(
                PathTerm(spec.hidden_size, spec.path_rank, head + 1) for head in range(spec.num_heads)
            )
        self.lm_heads = nn.ModuleList(
            nn.Linear(spec.hidden_size, spec.lm_head_rows, bias=False)
            for _ in range(1 if spec.shared_lm_head else spec.num_heads)
        )
        with torch.no_grad():
            for weight in self.lm_heads.parameters():
                weight.copy_(lm_head if token_map is None else lm_head[token_map])
        self.lm_heads.requires_grad_(not spec.shared_lm_head)

    def states(
        self,
        head: int,
        hidden: torch.Tensor,  # [positions, hidden_size]
        path: torch.Tensor | None = None,  # [positions, head + 1], int64
    ) -> torch.Tensor:
        """Return what one head's LM head reads, ``[positions, hidden_size]``.

        Args:
            head: the head, counted from 0.
            hidden: the target's hidden states after its final norm.
            path: the tokens from the root down to the node that the head continues; read by sequential heads only.

        """
        states = self.blocks[head](hidden)
        if self.spec.path_rank is None:
            return states
        assert path is not None
        assert self.embedding is not None
        return states + self.paths[head](hidden, normed(self.embedding[path].to(hidden.dtype)))

    def logits(self, head: int, hidden: torch.Tensor, path: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits ``[positions, spec.lm_head_rows]`` of one head; see ``states``."""
        return functional.linear(self.states(head, hidden, path), self.lm_head(head))

    def lm_head(self, head: int) -> torch.Tensor:
        """Return the weight ``[spec.lm_head_rows, hidden_size]`` of a head's LM head; all heads may share one."""
        return self.lm_heads[0 if self.spec.shared_lm_head else head].get_parameter("weight")

    def rows_of(
        self,
        tokens: torch.Tensor,  # int64
    ) -> torch.Tensor:
        """Return the row of the LM heads for each token or label, ``IGNORED`` where the heads cannot draft it."""
        if self.token_map is None:
            return tokens
        # One row more than tokens: ``IGNORED`` is looked up there.
        rows = torch.full((self.spec.vocab_size + 1,), IGNORED, device=tokens.device)
        rows[self.token_map] = torch.arange(len(self.token_map), device=tokens.device)
        return rows[tokens.masked_fill(tokens == IGNORED, self.spec.vocab_size)]
