# SPDX-License-Identifier: Apache-2.0
"""The draft trees that one step verifies, as positions, attention, the walk and the KV commit need them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_medusa.tree.drafts import NO_TOKEN
from vllm_medusa.tree.topology import ROOT

WORD_BITS = 63
"""Rows per word of an ancestor bitmask: the sign bit of an int64 stays clear, so shifts need no care."""

CAUSAL = -1
"""First ancestor word of a token that sees every token of its request up to itself; a row's words have no sign bit."""


@dataclass(frozen=True, eq=False)
class StepTrees:
    """The draft trees of one step. All tensors live on one device.

    A row is a place whose logits the step computes: the rows of a request are its root and its drafted tokens, its last
    tokens in the step. A request without a draft has one row. In a request of several rows all tokens are rows.

    Attributes:
        cu_num_rows: ``[num_reqs + 1]``, int: each request's first row, its root; at the end the number of rows (vLLM's
            ``cu_num_logits``).
        logits_indices: ``[num_rows]``, int: each row's index among the step's tokens.
        tokens: ``[num_rows]``, int64: the token ids; ``NO_TOKEN`` where the scheduler has padded a draft.
        parents: ``[num_rows]``, int64: the parent's index among all rows; ``ROOT`` for roots.
        positions: ``[num_rows]``, int64: the row's position, its root's and its depth.
        root_positions: ``[num_reqs]`` or longer, int32: the position of each request's root; where it has a draft,
            the length of its context.
        depths: ``[num_tokens]``, int64: edges between a row's token and its root; of no meaning for other tokens.
        ancestor_bits: ``[num_tokens, num_words]``, int64, contiguous: bit ``j % 63`` of word ``j // 63`` is set where
            the token may attend to row j of its request. A request whose first token has ``CAUSAL`` is causal.
        max_depth: at least the deepest tree's depth.
        num_drafting_reqs: ``count_drafting_reqs``.

    """

    cu_num_rows: torch.Tensor
    logits_indices: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor
    positions: torch.Tensor
    root_positions: torch.Tensor
    depths: torch.Tensor
    ancestor_bits: torch.Tensor
    max_depth: int
    num_drafting_reqs: int

    @property
    def roots(self) -> torch.Tensor:
        """``[num_reqs]``, int: each request's root, an index among all rows."""
        return self.cu_num_rows[:-1]

    def children(
        self,
        rows: torch.Tensor,  # [num_reqs], int64
        tokens: torch.Tensor,  # [num_reqs], int64
    ) -> torch.Tensor:
        """Find the child that carries a token.

        Args:
            rows: the row where each request stands.
            tokens: the token drawn there.

        Returns:
            ``[num_reqs]``, int64: the child's row, -1 where no child carries the token.

        """
        drawn = torch.full_like(self.tokens, NO_TOKEN - 1).index_copy_(0, rows, tokens)
        parents = self.parents.clamp(min=0)
        is_child = (drawn[parents] == self.tokens) & (self.parents >= 0)
        row = torch.arange(len(parents), device=parents.device)
        child = torch.full_like(parents, -1)
        return child.scatter_reduce_(0, parents, torch.where(is_child, row, -1), "amax")[rows]

    def paths(self) -> torch.Tensor:
        """Return the path to each row, ``[num_rows, max_depth + 1]``, int64; the row itself fills it up."""
        above = [torch.arange(len(self.parents), device=self.parents.device)]
        for _ in range(self.max_depth):
            parent = self.parents[above[-1]]
            above.append(torch.where(parent >= 0, parent, above[-1]))
        level = torch.arange(self.max_depth + 1, device=self.parents.device)
        depths = self.depths[self.logits_indices]
        return torch.stack(above, dim=1).gather(1, (depths[:, None] - level).clamp(min=0))

    def branching_reqs(self) -> torch.Tensor:
        """Return the requests whose trees are no chains, ``[num_branching]``, int64; on the CPU only."""
        parents = self.parents.numpy()
        bent = np.flatnonzero((parents >= 0) & (parents != np.arange(-1, len(parents) - 1)))
        return torch.from_numpy(np.unique(np.searchsorted(self.cu_num_rows.numpy(), bent, side="right")) - 1)

    def part(self, start: int, end: int, first_row: int, last_row: int) -> StepTrees:
        """Return the trees of the requests from ``start`` to ``end``, excluded, whose rows these are, as a step's."""
        return replace(
            self,
            cu_num_rows=self.cu_num_rows[start : end + 1] - first_row,
            logits_indices=self.logits_indices[first_row:last_row],
            tokens=self.tokens[first_row:last_row],
            parents=(self.parents[first_row:last_row] - first_row).clamp(min=ROOT),
            positions=self.positions[first_row:last_row],
            root_positions=self.root_positions[start:end],
        )

    @classmethod
    def allocate(cls, num_nodes: int, max_num_reqs: int, max_num_tokens: int, device: torch.device) -> StepTrees:
        """Allocate what ``derive_kernel`` fills for every step; before the first one, all tokens are causal.

        Args:
            num_nodes: of the largest tree.
            max_num_reqs: requests of the largest step.
            max_num_tokens: tokens of the largest step.
            device: where to.

        """
        max_num_rows = min(max_num_reqs * (num_nodes + 1), max_num_tokens)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        return cls(
            cu_num_rows=zeros(1),
            logits_indices=zeros(0),
            tokens=zeros(max_num_rows),
            parents=zeros(max_num_rows),
            positions=zeros(max_num_rows),
            root_positions=zeros(max_num_reqs).int(),
            depths=zeros(max_num_tokens),
            ancestor_bits=zeros(max_num_tokens, num_words(num_nodes)).fill_(CAUSAL),
            max_depth=0,
            num_drafting_reqs=0,
        )


def count_drafting_reqs(
    num_drafts: np.ndarray,  # [num_reqs], int
) -> int:
    """Return the number of requests up to the last one that has a draft."""
    return int(np.flatnonzero(num_drafts).max(initial=-1)) + 1


def num_words(num_nodes: int) -> int:
    """Return how many words hold the ancestors of a tree's rows."""
    return -(-(num_nodes + 1) // WORD_BITS)


def derive_trees(
    parents: torch.Tensor,  # [num_reqs, num_nodes], int64
    cu_num_rows: torch.Tensor,  # [num_reqs + 1], int64
    logits_indices: torch.Tensor,  # [num_rows], int64
    input_ids: torch.Tensor,  # [num_tokens], int
    positions: torch.Tensor,  # [num_tokens], int64
    max_depth: int,
    num_drafting_reqs: int,
) -> StepTrees:
    """Derive a step's trees from its drafts' parents and lengths, by pointer jumping, on the CPU.

    vLLM has prepared the step as if its drafts were chains. In place, each row of a tree moves to the position of its
    depth, and tokens that the scheduler has padded, which have no embedding, become token 0.

    Args:
        parents: ``Drafts.parents`` of each request; of a draft that the scheduler has cut, only the first count.
        cu_num_rows: each request's first row.
        logits_indices: each row's index among the step's tokens.
        input_ids: the step's tokens.
        positions: their positions.
        max_depth: at least the deepest tree's depth.
        num_drafting_reqs: ``count_drafting_reqs``.

    """
    # NumPy, on the tensors' own memory: on so few numbers its operations cost a third of PyTorch's.
    first, rows, ids = cu_num_rows.numpy(), logits_indices.numpy(), input_ids.numpy()
    request = np.repeat(np.arange(len(parents)), np.diff(first))
    root = first[request]
    row = np.arange(len(rows)) - root
    is_node = row > 0
    # A root's parent is itself, so that jumps end there.
    above = root + np.where(is_node, parents.numpy()[request, row - 1], 0)
    tree_parents = np.where(is_node, above, ROOT)
    depths = is_node.astype(np.int64)
    words = np.zeros((len(rows), num_words(parents.shape[1])), dtype=np.int64)
    words[np.arange(len(rows)), row // WORD_BITS] = 1 << row % WORD_BITS
    for _ in range(max_depth.bit_length()):
        words |= words[above]
        depths += depths[above]
        above = above[above]
    tokens = ids[rows].astype(np.int64)
    np.maximum(ids, 0, out=ids)
    row_positions = positions.numpy()[rows] + depths - row
    positions.numpy()[rows] = row_positions
    token_depths = np.zeros(len(ids), dtype=np.int64)
    token_depths[rows] = depths
    token_words = np.full((len(ids), words.shape[1]), CAUSAL, dtype=np.int64)
    token_words[rows] = words
    return StepTrees(
        cu_num_rows=cu_num_rows,
        logits_indices=logits_indices,
        tokens=torch.from_numpy(tokens),
        parents=torch.from_numpy(tree_parents),
        positions=torch.from_numpy(row_positions),
        root_positions=torch.from_numpy(row_positions[first[:-1]].astype(np.int32)),
        depths=torch.from_numpy(token_depths),
        ancestor_bits=torch.from_numpy(token_words),
        max_depth=max_depth,
        num_drafting_reqs=num_drafting_reqs,
    )
