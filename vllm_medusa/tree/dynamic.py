# SPDX-License-Identifier: Apache-2.0
"""A tree for each request and step, grown best-first from the heads' own probabilities.

The tree of n nodes with the most tokens accepted per step is that of the n most probable paths, for a path is at most
as probable as its parent (the argument of ``best_first``, with the probabilities of this very step in the place
of averages). A path is also at most as probable as one that has a better rank somewhere and no worse one anywhere. So a
path that is among the best n leaves room for all of those, which bounds its ranks: the candidates are few, known
beforehand, and one sort of their probabilities grows the trees of all requests.

Each head gives the probabilities of its own tokens. Were the heads independent, a path's probability would be the
product of its tokens'; but their top-1 tokens mostly belong to one continuation, and come true together as often as the
least probable of them at best. As long as a path follows the top-1 tokens, it counts as the geometric mean of these two
bounds; from where it leaves them on, tokens multiply. All of the above holds for probabilities so defined. Of the three
the mean is the best calibrated, with temperatures too (docs/training.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from vllm_medusa.tree.candidates import grow_trees
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.static import RankPath, check_size, from_paths

MAX_CANDIDATES = 1 << 14
"""Most paths that are weighed for each request and step."""


class DynamicTree:
    """Grows a tree of at most ``num_nodes`` nodes for each request.

    Args:
        num_heads: heads that draft, the deepest node's depth.
        num_nodes: most nodes of a tree, the root not counted.
        top_k: most tokens of each head that a tree may use.
        min_probability: the least probability of a path that is drafted, by the heads' own judgement.

    Raises:
        ValueError: ``num_nodes`` is too many, more than ``MAX_CANDIDATES`` paths would have to be weighed, or fewer
            than ``num_nodes`` exist.

    Attributes:
        candidates: every path that a tree can hold, better ones first wherever that is known beforehand.

    """

    def __init__(self, num_heads: int, num_nodes: int, top_k: int, min_probability: float) -> None:
        check_size(num_nodes)
        num_heads = min(num_heads, num_nodes)  # No path has more nodes than the tree.
        self.num_heads, self.num_nodes, self.top_k = num_heads, num_nodes, min(top_k, num_nodes)
        self.min_probability = min_probability
        self.candidates = from_paths(self._candidate_paths())
        paths = [(), *map(tuple, self.candidates.choices)]
        if len(paths) <= num_nodes:
            raise ValueError(
                f"medusa_tree: {num_heads} heads of {top_k} tokens give trees of at most {len(paths) - 1} nodes, not "
                f"{num_nodes}; lower num_speculative_tokens or raise medusa_top_k"
            )
        self._row = torch.arange(num_nodes + 1)
        depth, self._parent = self.candidates.topology.depths, self.candidates.topology.parents
        # A path's terms are its tokens' log-probabilities; shorter paths are filled up with a rank whose term is 0.
        ranks = torch.tensor([[*path, *[self.top_k] * (num_heads - len(path))] for path in paths])
        self._terms = ranks + torch.arange(num_heads) * (self.top_k + 1)
        follows = (ranks == 0).cummin(dim=1).values
        self._leaves, self._weight = ~follows, 1 - follows / 2
        self._token = (depth - 1).clamp(min=0) * self.top_k + self.candidates.ranks

    def to(self, device: torch.device) -> DynamicTree:
        """Return a tree that grows on another device."""
        moved = copy.copy(self)
        for name in ("_row", "_parent", "_terms", "_leaves", "_weight", "_token"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    @property
    def branches(self) -> bool:
        """Whether a tree may be another than a chain."""
        return not self.candidates.topology.is_chain

    @property
    def depth(self) -> int:
        """The longest path that a tree may have: how many heads it needs."""
        return self.num_heads

    def draft(
        self,
        tokens: torch.Tensor,  # [num_reqs, heads, top_k], int64
        log_probs: torch.Tensor,  # [num_reqs, heads, top_k], float32
    ) -> Drafts:
        """Grow each request's tree, best first.

        Args:
            tokens: each head's most probable tokens, best first.
            log_probs: their log-probabilities.

        """
        scores = self._scores(log_probs)
        flat = tokens.flatten(1)
        return grow_trees(
            scores,
            self._parent.expand_as(scores),
            self._row,
            self.min_probability,
            lambda node: flat.gather(1, self._token[node]),
        )

    def _scores(
        self,
        log_probs: torch.Tensor,  # [num_reqs, heads, top_k], float32
    ) -> torch.Tensor:  # [num_reqs, candidates], float32
        """Return the logarithms of the candidates' probabilities; -inf from a head that predicts no numbers."""
        terms = pad(log_probs, (0, 1)).flatten(1)[:, self._terms]
        # No path is more probable than its parent, not by rounding either: the sum and the least only fall.
        scores = (terms * self._weight).sum(dim=-1) + terms.masked_fill(self._leaves, 0).amin(dim=-1) / 2
        return scores.nan_to_num_(nan=-math.inf, neginf=-math.inf)

    def _candidate_paths(self) -> list[RankPath]:
        """Return the paths that leave room for all that are at least as probable, those that need least room first."""
        rooms: dict[RankPath, int] = {}
        for path, room in self._paths_within((), 1, 0):
            rooms[path] = room
            if len(rooms) > MAX_CANDIDATES:
                raise ValueError(
                    f'medusa_tree: "dynamic" would weigh more than {MAX_CANDIDATES} paths for {self.num_nodes} nodes '
                    f"of {self.num_heads} heads of {self.top_k} tokens; lower num_speculative_tokens or medusa_top_k"
                )
        return sorted(rooms, key=lambda path: (rooms[path], path))

    def _paths_within(self, path: RankPath, breadth: int, room: int) -> Iterator[tuple[RankPath, int]]:
        """Yield all paths below one, each with the number of paths that are at least as probable, itself counted.

        For each length up to the path's own those are the paths of no worse ranks, ``breadth`` at the last one.
        """
        for rank in range(self.top_k if len(path) < self.num_heads else 0):
            needed = room + breadth * (rank + 1)
            if needed > self.num_nodes:
                return
            yield (*path, rank), needed
            yield from self._paths_within((*path, rank), breadth * (rank + 1), needed)
