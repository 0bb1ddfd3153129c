"""A tree for each request and step, grown best-first from the heads' own probabilities.

The tree of n nodes with the most tokens accepted per step is that of the n most probable paths, for a path is at most
as probable as its parent (the argument of ``static.best_first``, with the probabilities of this very step in the place
of averages). A path is also at most as probable as one that has a better rank somewhere and no worse one anywhere. So a
path that is among the best n leaves room for all of those, which bounds its ranks: the candidates are few, known
beforehand, and one sort of their probabilities grows the trees of all requests.

Each head gives the probabilities of its own tokens. Were the heads independent, a path's probability would be the
product of its tokens'; but their top-1 tokens mostly belong to one continuation, and come true together as often as the
least probable of them at best. As long as a path follows the top-1 tokens, it counts as the geometric mean of these two
bounds; from where it leaves them on, tokens multiply. All of the above holds for probabilities so defined.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_medusa.tree.layout import TreeStack
from vllm_medusa.tree.static import Path, check_size, from_paths
from vllm_medusa.tree.topology import ROOT

MAX_CANDIDATES = 1 << 14
"""Most paths that are weighed for each request and step."""


@dataclass(frozen=True, eq=False)
class GrownTrees:
    """Trees of several requests, as rows of the candidate tree.

    Attributes:
        candidate: ``[requests, rows]``, int64: which candidate each row is, the root first, then the most probable (but
            the top-1 chain before all others where improbable paths are left out).
        length: ``[requests]``, int64: the rows that are worth verifying, the root counted.

    """

    candidate: torch.Tensor
    length: torch.Tensor


class DynamicTree:
    """Grows trees of at most ``nodes`` nodes.

    Args:
        num_heads: heads that draft, the deepest node's depth.
        nodes: most nodes of a tree, the root not counted.
        top_k: most tokens of each head that a tree may use.
        min_probability: what a row has to be worth: the least probability of a path that is drafted, by the heads' own
            judgement, and the least by which a tree's branches together exceed theirs.

    Raises:
        ValueError: ``nodes`` is too many, more than ``MAX_CANDIDATES`` paths would have to be weighed, or fewer than
            ``nodes`` exist.

    Attributes:
        candidates: every path that a tree can hold, better ones first wherever that is known beforehand.
        chain: ``[rows]``, int64: the rows of a tree that begins with the chain of the heads' top-1 tokens.

    """

    def __init__(self, num_heads: int, nodes: int, top_k: int, min_probability: float) -> None:
        check_size(nodes)
        self.num_heads, self.nodes, self.top_k = num_heads, nodes, min(top_k, nodes)
        self.min_probability = min_probability
        self.candidates = from_paths(self._candidate_paths())
        paths = [(), *map(tuple, self.candidates.choices)]
        if len(paths) <= nodes:
            raise ValueError(
                f"medusa_tree: {num_heads} heads of {top_k} tokens give trees of at most {len(paths) - 1} nodes, not "
                f"{nodes}; lower num_speculative_tokens or raise medusa_top_k"
            )
        row = {path: index for index, path in enumerate(paths)}
        self._depth, self._parent = self.candidates.topology.depths, self.candidates.topology.parents.clamp(min=0)
        # Shorter paths are filled up with themselves, and with a rank that no path has and that adds nothing.
        self._line = torch.tensor([[row[path[:depth]] for depth in range(num_heads + 1)] for path in paths])
        ranks = torch.tensor([[*path, *[self.top_k] * (num_heads - len(path))] for path in paths])
        self._terms = ranks + torch.arange(num_heads) * (self.top_k + 1)
        follows = (ranks == 0).cummin(dim=1).values
        self._on_chain, self._leaves, self._weight = follows.sum(dim=1) == self._depth, ~follows, 1 - follows / 2
        self._token = (self._depth - 1).clamp(min=0) * self.top_k + self.candidates.ranks
        self.chain = (~self._on_chain).long().argsort(stable=True)[: len(self)]

    def __len__(self) -> int:
        return self.nodes + 1

    def to(self, device: torch.device) -> DynamicTree:
        """Return a tree that grows on another device."""
        moved = copy.copy(self)
        for name in ("chain", "_depth", "_parent", "_line", "_terms", "_on_chain", "_leaves", "_weight", "_token"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    @property
    def branches(self) -> bool:
        """Whether a tree may be another than a chain."""
        return not self.candidates.topology.is_chain

    @property
    def chain_length(self) -> int:
        """Nodes of the chain that ``chain`` begins with."""
        return min(self.num_heads, self.nodes)

    def grow(
        self,
        log_probs: torch.Tensor,  # [requests, heads, top_k], float32
    ) -> GrownTrees:
        """Grow each request's tree from the log-probabilities of its heads' best tokens, best first."""
        terms = pad(log_probs, (0, 1)).flatten(1)[:, self._terms]
        # No path is more probable than its parent, not by rounding either: the sum and the least only fall.
        scores = (terms * self._weight).sum(dim=-1) + terms.masked_fill(self._leaves, 0).amin(dim=-1) / 2
        # A head that is broken drafts nothing.
        scores.nan_to_num_(nan=-math.inf, neginf=-math.inf)
        # A stable sort keeps the order of the candidates among equals, in which parents come first.
        best = scores.sort(dim=1, descending=True, stable=True)
        candidate, scores = best.indices[:, : len(self)], best.values[:, : len(self)]
        if not self.min_probability:
            return GrownTrees(candidate, (scores > -math.inf).sum(dim=1))
        return self._prune(candidate, scores)

    def _prune(
        self,
        candidate: torch.Tensor,  # [requests, rows], int64
        scores: torch.Tensor,  # [requests, rows], float32, logarithms of probabilities
    ) -> GrownTrees:
        """Leave out rows that are not worth verifying.

        ``min_probability`` is what a row costs, in tokens. A tree that branches costs a masked attention pass besides,
        about as much as a row; its branches stay if what they promise beyond their own cost pays for that. A chain that
        comes first is where an ordinary sequence has it: what is accepted of it need not be moved in the KV cache.
        """
        on_chain, probable = self._on_chain[candidate], scores >= math.log(self.min_probability)
        surplus = (scores.exp() - self.min_probability).masked_fill(~probable | on_chain, 0).sum(dim=1, keepdim=True)
        kept = probable & (on_chain | (surplus >= self.min_probability))
        order = torch.where(kept, (~on_chain).long(), 2).sort(dim=1, stable=True).indices
        return GrownTrees(candidate.gather(1, order), kept.sum(dim=1))

    def fill(
        self,
        candidate: torch.Tensor,  # [requests, rows], int64
        tokens: torch.Tensor,  # [requests, heads, top_k], int64
    ) -> torch.Tensor:
        """Return the tokens of all rows but the roots, ``[requests, rows - 1]``, from the heads' best ones."""
        return tokens.flatten(1).gather(1, self._token[candidate[:, 1:]])

    def stack(
        self,
        candidate: torch.Tensor,  # [requests, rows], int64
    ) -> TreeStack:
        """Return the trees that rows of the candidate tree form; each row's parent must come before it."""
        requests, rows = candidate.shape
        position = candidate.new_zeros(requests, len(self._parent))
        position.scatter_(1, candidate, torch.arange(rows, device=candidate.device).expand(requests, -1))
        parents = position.gather(1, self._parent[candidate])
        parents[:, 0] = ROOT
        lines = position.gather(1, self._line[candidate].flatten(1)).view(requests, rows, -1)
        ancestors = candidate.new_zeros(requests, rows, rows, dtype=torch.bool).scatter_(2, lines, True)
        return TreeStack(parents, self._depth[candidate], ancestors)

    def _candidate_paths(self) -> list[Path]:
        """Return the paths that leave room for all that are at least as probable, those that need least room first."""
        rooms: dict[Path, int] = {}
        for path, room in self._paths_within((), 1, 0):
            rooms[path] = room
            if len(rooms) > MAX_CANDIDATES:
                raise ValueError(
                    f'medusa_tree: "dynamic" would weigh more than {MAX_CANDIDATES} paths for {self.nodes} nodes of '
                    f"{self.num_heads} heads of {self.top_k} tokens; lower num_speculative_tokens or medusa_top_k"
                )
        return sorted(rooms, key=lambda path: (rooms[path], path))

    def _paths_within(self, path: Path, breadth: int, room: int) -> Iterator[tuple[Path, int]]:
        """Yield all paths below one, each with the number of paths that are at least as probable, itself counted.

        For each length up to the path's own those are the paths of no worse ranks, ``breadth`` at the last one.
        """
        for rank in range(self.top_k if len(path) < self.num_heads else 0):
            needed = room + breadth * (rank + 1)
            if needed > self.nodes:
                return
            yield (*path, rank), needed
            yield from self._paths_within((*path, rank), breadth * (rank + 1), needed)
