# SPDX-License-Identifier: Apache-2.0
"""Whether drafted nodes are accepted as often as their scores say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vllm_medusa.evaluation.served import CHUNK, ServedHeads, draft
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.dynamic import DynamicTree

BINS = 15
"""Equal intervals of scores, as Guo et al. take them (arXiv 1706.04599)."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Held-out positions at which a target stands.

    Attributes:
        hidden: ``[positions, hidden_size]``: its hidden states.
        roots: ``[positions]``, int64: the tokens that it says next.
        following: ``[positions, heads]``, int64: those after them, which heads predict.
        text: ``[positions, length]``, int32: what is known of the text, up to the roots (see ``last_tokens``).

    """

    hidden: torch.Tensor
    roots: torch.Tensor
    following: torch.Tensor
    text: torch.Tensor

    def where(
        self,
        kept: torch.Tensor,  # [positions], bool
    ) -> Positions:
        """Return some of the positions."""
        kept = kept.to(self.hidden.device)
        return Positions(self.hidden[kept], self.roots[kept], self.following[kept], self.text[kept])

    @classmethod
    def cat(cls, parts: Sequence[Positions]) -> Positions:
        """Return all of the positions."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class Bin:
    """Nodes of similar scores.

    Attributes:
        nodes: how many.
        score: their mean score.
        accepted: the share that is accepted.

    """

    nodes: int
    score: float
    accepted: float


@dataclass(frozen=True)
class Reliability:
    """What scores say of some nodes, and what is accepted.

    Attributes:
        bins: the nodes by score, ascending; empty bins are left out.

    """

    bins: tuple[Bin, ...]

    @classmethod
    def of(
        cls,
        scores: torch.Tensor,  # [nodes], float32, probabilities
        accepted: torch.Tensor,  # [nodes], bool
    ) -> Reliability:
        """Compare."""
        index = (scores * BINS).long().clamp(max=BINS - 1)
        count = index.bincount(minlength=BINS)
        weights = (scores.double(), accepted.double())
        score, right = (index.bincount(each, minlength=BINS) / count for each in weights)
        columns = zip(count.tolist(), score.tolist(), right.tolist(), strict=True)
        return cls(tuple(Bin(*column) for column in columns if column[0]))

    @property
    def nodes(self) -> int:
        return sum(each.nodes for each in self.bins)

    @property
    def score(self) -> float:
        """The mean score; 0 without nodes."""
        return self._mean([each.score for each in self.bins])

    @property
    def accepted(self) -> float:
        """The share of nodes that is accepted; 0 without nodes."""
        return self._mean([each.accepted for each in self.bins])

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: how far score and share are apart in a bin, on average over the nodes."""
        return self._mean([abs(each.score - each.accepted) for each in self.bins])

    def _mean(self, of_bins: list[float]) -> float:
        total = sum(each.nodes * value for each, value in zip(self.bins, of_bins, strict=True))
        return total / max(self.nodes, 1)


@dataclass(frozen=True)
class DraftReliability:
    """The reliability of trees that follow the heads' probabilities.

    Attributes:
        depths: of the nodes of depth 1, 2, ...
        predicted_length: tokens per step by the scores.
        acceptance_length: tokens per step by the text.

    """

    depths: tuple[Reliability, ...]
    predicted_length: float
    acceptance_length: float


def accepted_nodes(
    drafts: Drafts,
    following: torch.Tensor,  # [positions, heads], int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which nodes are accepted, bool, and their depths, int64, ``[positions, nodes]`` both."""
    shape = (len(following), drafts.tokens.shape[1] + 1)
    right = torch.ones(shape, dtype=torch.bool, device=following.device)
    depths = torch.zeros(shape, dtype=torch.int64, device=following.device)
    for node in range(drafts.tokens.shape[1]):
        parent = drafts.parents[:, node, None]
        above = depths.gather(1, parent)
        depths[:, node + 1] = above[:, 0] + 1
        expected = following.gather(1, above) == drafts.tokens[:, node, None]
        right[:, node + 1] = (right.gather(1, parent) & expected)[:, 0]
    return right[:, 1:], depths[:, 1:]


@torch.no_grad()
def draft_reliability(served: ServedHeads, tree: DynamicTree | BeamTree, positions: Positions) -> DraftReliability:
    """Draft at each position, and compare the scores with the text."""
    tree = tree.to(positions.hidden.device)
    scores, accepted, depths = [], [], []
    for start in range(0, len(positions.roots), CHUNK):
        part = slice(start, start + CHUNK)
        following = positions.following[part]
        drafts = draft(served, tree, positions.hidden[part], positions.roots[part], positions.text[part])
        assert drafts.log_probs is not None
        right, depth = accepted_nodes(drafts, following)
        scores.append(drafts.log_probs.exp().cpu())
        accepted.append((right & (drafts.log_probs > -torch.inf)).cpu())
        depths.append(depth.cpu())
    score, right, depth = torch.cat(scores), torch.cat(accepted), torch.cat(depths)
    return DraftReliability(
        depths=tuple(Reliability.of(score[depth == d], right[depth == d]) for d in range(1, tree.depth + 1)),
        predicted_length=1 + score.sum().item() / max(len(score), 1),
        acceptance_length=1 + right.sum().item() / max(len(score), 1),
    )
