# SPDX-License-Identifier: Apache-2.0
"""What heads say where they are served: their logits, and their drafts at positions of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.target_logits import TargetLogits
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.levels import Asked, LevelHeads
from vllm_medusa.tree.lookup import LookupHeads, mixed, weights_tensor

CHUNK = 64
"""Positions that are drafted for at a time."""


@dataclass(frozen=True, eq=False)
class ServedHeads:
    """Heads with what serving does to their logits.

    Attributes:
        heads: the heads.
        transform: what happens to the LM head's output.
        temperatures: ``[heads]``, float32: what it is divided by then.
        lookup_weights: ``[heads, match lengths]``, float32: see ``LookupHeads``; None if paths are not looked up.

    """

    heads: TrainableHeads
    transform: Callable[[torch.Tensor], torch.Tensor]
    temperatures: torch.Tensor
    lookup_weights: torch.Tensor | None = None

    @classmethod
    def of(cls, target: PreTrainedModel, heads: TrainableHeads, logit_scale: float = 1.0) -> ServedHeads:
        """Return the heads at temperature 1.

        Args:
            target: their target; heads without LM heads of their own are served with its own, and all it does there.
            heads: the heads.
            logit_scale: that of their ``config.json``, a factor on the logits of their own LM heads.

        Raises:
            ValueError: the target does to its logits what is not known.

        """
        ones = torch.ones(heads.spec.num_heads)
        if heads.spec.shared_lm_head and heads.token_map is None:
            return cls(heads, TargetLogits(target).transform, ones)
        return cls(heads, lambda logits: logits * logit_scale, ones)

    def at(self, temperatures: list[float], lookup_weights: list[list[float]] | None = None) -> ServedHeads:
        """Return the heads as they are served with these entries of their ``config.json``."""
        weights = None
        if lookup_weights is not None:
            weights = weights_tensor(lookup_weights).to(next(self.heads.parameters()).device)
        return replace(self, temperatures=torch.tensor(temperatures), lookup_weights=weights)

    def logits(
        self,
        head: int,
        hidden: torch.Tensor,  # [positions, hidden_size]
        path: torch.Tensor | None = None,  # [positions, head + 1], int64
    ) -> torch.Tensor:
        """Return ``[positions, rows]``, float32; the arguments are those of ``TrainableHeads.logits``."""
        logits = self.transform(self.heads.logits(head, hidden, path).float())
        return logits / self.temperatures[head].item()

    def best_tokens(
        self,
        head: int,
        logits: torch.Tensor,  # [positions, rows], float32
        top_k: int,
        found: torch.Tensor,  # [positions], int64
        lengths: torch.Tensor,  # [positions], int64
    ) -> torch.Tensor:
        """Return the most probable tokens, ``[positions, at most top_k]``, int64, best first.

        Args:
            head: the head.
            logits: what it says.
            top_k: how many to return.
            found: what followed the paths' longest matches (see ``Matches``); read only where paths are looked up.
            lengths: these matches' lengths.

        """
        top_k = min(top_k, logits.shape[-1])
        log_probs, rows = logits.log_softmax(dim=-1).topk(top_k)
        tokens = rows if self.heads.token_map is None else self.heads.token_map[rows]
        if self.lookup_weights is None:
            return tokens
        return mixed(log_probs, tokens, found, self.lookup_weights[head][lengths], top_k)[1]

    def top(
        self,
        head: int,
        hidden: torch.Tensor,  # [positions, hidden_size]
        top_k: int,
        path: torch.Tensor | None = None,  # [positions, head + 1], int64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most probable tokens and their log-probabilities, ``[positions, top_k]`` both, best first."""
        log_probs, rows = self.logits(head, hidden, path).log_softmax(dim=-1).topk(top_k)
        return rows if self.heads.token_map is None else self.heads.token_map[rows], log_probs


class ServedLevels:
    """Heads on hidden states as ``LevelHeads``."""

    def __init__(
        self,
        served: ServedHeads,
        hidden: torch.Tensor,  # [positions, hidden_size]
    ) -> None:
        self._served, self._hidden = served, hidden
        self._paths: torch.Tensor | None = None  # [positions, nodes, depth], int64

    def top_tokens(self, asked: Asked, top_k: int) -> torch.Tensor:
        """Ask the next head (see ``LevelHeads``)."""
        return self.top_predictions(asked, top_k)[1]

    def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the next head (see ``LevelHeads``)."""
        paths = asked.tokens[:, :, None]
        if self._paths is not None and asked.parents is not None:
            parents = asked.parents[:, :, None].expand(-1, -1, self._paths.shape[2])
            paths = torch.cat([self._paths.gather(1, parents), paths], dim=2)
        self._paths = paths
        hidden = self._hidden.repeat_interleave(paths.shape[1], dim=0)
        found = self._served.top(paths.shape[2] - 1, hidden, top_k, paths.flatten(0, 1))
        tokens, log_probs = (each.view(*paths.shape[:2], top_k) for each in found)
        return log_probs, tokens


def draft(
    served: ServedHeads,
    tree: DynamicTree | BeamTree,
    hidden: torch.Tensor,  # [positions, hidden_size]
    roots: torch.Tensor,  # [positions], int64
    text: torch.Tensor,  # [positions, length], int32
) -> Drafts:
    """Draft at each position as an engine does (see ``MedusaProposer.propose``)."""
    if isinstance(tree, BeamTree):
        heads: LevelHeads = ServedLevels(served, hidden)
        if served.lookup_weights is not None:
            heads = LookupHeads(heads, text, served.lookup_weights, served.heads.spec.vocab_size)
        return tree.draft(heads, roots)
    best = [served.top(head, hidden, tree.top_k) for head in range(tree.depth)]
    tokens, log_probs = (torch.stack(each, dim=1) for each in zip(*best, strict=True))
    return tree.draft(tokens, log_probs)
