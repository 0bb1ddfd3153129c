# SPDX-License-Identifier: Apache-2.0
"""Heads that read the path to a node, asked level by level (Hydra's sequential dependence, arXiv 2402.05109).

Head k's state at a node is ``block_k(h) + Q_k SiLU(P_k h + sum_j U_kj e(x_j))``; x_j are the tokens from the root down
to the node, e is the target's own input embedding, scaled to a root mean square of 1. A node's sums are its parent's
and one more term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from vllm.model_executor.layers.linear import ReplicatedLinear

from vllm_medusa.checkpoint.format import NORM_EPS
from vllm_medusa.tree.levels import Asked


class PathTerms(nn.Module):
    """All heads' layers that read paths. Every tensor-parallel rank computes all of them, as with the blocks."""

    def __init__(self, num_heads: int, hidden_size: int, rank: int, prefix: str) -> None:
        super().__init__()
        self.num_heads, self.rank = num_heads, rank
        self.down = ReplicatedLinear(hidden_size, num_heads * rank, bias=True, prefix=f"{prefix}.down")
        # The token at a place is read by the heads from that place on, all at once.
        self.tokens = nn.ModuleList(
            ReplicatedLinear(hidden_size, (num_heads - place) * rank, bias=False, prefix=f"{prefix}.tokens.{place}")
            for place in range(num_heads)
        )
        self.up = nn.ModuleList(
            ReplicatedLinear(rank, hidden_size, bias=False, prefix=f"{prefix}.up.{head}") for head in range(num_heads)
        )

    def start(
        self,
        hidden: torch.Tensor,  # [num_reqs, hidden_size]
    ) -> torch.Tensor:
        """Return the sums before any token, ``[num_reqs, 1, heads, rank]``."""
        return self.down(hidden)[0].view(len(hidden), 1, self.num_heads, self.rank)

    def read(
        self,
        place: int,
        embedded: torch.Tensor,  # [num_reqs, nodes, hidden_size]
    ) -> torch.Tensor:
        """Return what the tokens at a place add to the sums of the heads from there on.

        Returns:
            ``[num_reqs, nodes, heads - place, rank]``.

        """
        added: torch.Tensor = self.tokens[place](embedded)[0]
        return added.unflatten(-1, (self.num_heads - place, self.rank))

    def term(
        self,
        head: int,
        sums: torch.Tensor,  # [num_reqs, nodes, rank]
    ) -> torch.Tensor:
        """Return what a head adds to its state, ``[num_reqs, nodes, hidden_size]``."""
        term: torch.Tensor = self.up[head](silu(sums))[0]
        return term

    def part(self, head: int, name: str) -> torch.Tensor:
        """Return where a head's tensor, named as in the checkpoint after ``paths.HEAD.``, is held."""
        layer, *rest = name.split(".")
        if layer == "up":
            return self.up[head].get_parameter("weight").data
        if layer == "tokens":
            place = int(rest[0])
            return self.tokens[place].get_parameter("weight").data.unflatten(0, (-1, self.rank))[head - place]
        return self.down.get_parameter(rest[0]).data.unflatten(0, (-1, self.rank))[head]


class BestOfHead(Protocol):
    """A head's vocabulary."""

    def __call__(
        self,
        head: int,
        states: torch.Tensor,  # [rows, hidden_size]
        top_k: int,
        return_log_probs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and tokens, both ``[rows, top_k]``: the most probable tokens, best first.

        Values are the tokens' log-probabilities if these are asked for, which reads all logits once more.
        """


class PathHeads:
    """A step's heads as ``LevelHeads``.

    Args:
        states: ``[heads, num_reqs, hidden_size]``: the blocks' output.
        sums: ``[num_reqs, 1, heads, rank]``: ``PathTerms.start``.
        terms: the layers that read paths.
        embed: the target's input embedding of tokens of any shape.
        best: a head's most probable tokens (see ``BestOfHead``).

    """

    def __init__(
        self,
        states: torch.Tensor,
        sums: torch.Tensor,
        terms: PathTerms,
        embed: Callable[[torch.Tensor], torch.Tensor],
        best: BestOfHead,
    ) -> None:
        self._states, self._sums, self._terms, self._embed, self._best = states, sums, terms, embed, best
        self._level = 0

    def top_tokens(self, asked: Asked, top_k: int) -> torch.Tensor:
        """Ask the next head (see ``LevelHeads``)."""
        return self._ask(asked, top_k, return_log_probs=False)[1]

    def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the next head (see ``LevelHeads``)."""
        log_probs, tokens = self._ask(asked, top_k, return_log_probs=True)
        return log_probs.float(), tokens

    def _ask(self, asked: Asked, top_k: int, return_log_probs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and tokens of the nodes' children, both ``[num_reqs, nodes, top_k]`` (see ``BestOfHead``)."""
        level, sums = self._level, self._sums
        if asked.parents is not None:
            parents = asked.parents[:, :, None, None].expand(-1, -1, sums.shape[2] - 1, sums.shape[3])
            sums = sums[:, :, 1:].gather(1, parents)
        embedded = self._embed(asked.tokens.flatten()).view(*asked.tokens.shape, -1)
        normed = rms_norm(embedded, embedded.shape[-1:], eps=NORM_EPS)
        self._sums = sums = sums + self._terms.read(level, normed)
        self._level += 1
        states = self._states[level][:, None] + self._terms.term(level, sums[:, :, 0])
        values, tokens = self._best(level, states.flatten(0, 1), top_k, return_log_probs)
        shape = (*asked.tokens.shape, top_k)
        return values.view(shape), tokens.view(shape)
