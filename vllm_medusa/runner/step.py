"""One decode step in the core's terms: the trees that a step verifies, whichever model runner carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_medusa.attention.metadata import TreeQueries
from vllm_medusa.tree.batch import TreeBatch
from vllm_medusa.tree.topology import DraftTree

CHAIN, TREE = 0, 1
"""Rows of the table that ``TreeTable.of`` makes."""


@dataclass(frozen=True, eq=False)
class TreeTable:
    """The trees that drafts may have, as padded tensors, so that a step gathers its rows from them.

    Attributes:
        parents: ``[trees, rows]``, int64.
        depths: ``[trees, rows]``, int64.
        ancestors: ``[trees, rows, rows]``, bool.
        chain_rows: ``[trees]``, int64: the largest prefix of each tree that is a chain.

    """

    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    chain_rows: torch.Tensor

    @classmethod
    def of(cls, tree: DraftTree) -> TreeTable:
        """Return the table for an engine: the chain for drafts that have to be one, and the tree for all others."""
        return cls.build([DraftTree.chain(len(tree) - 1), tree])

    @classmethod
    def build(cls, trees: Sequence[DraftTree]) -> TreeTable:
        """Stack trees, padded to the largest."""
        rows = max(len(tree) for tree in trees)
        ancestors = torch.zeros(len(trees), rows, rows, dtype=torch.bool)
        for index, tree in enumerate(trees):
            ancestors[index, : len(tree), : len(tree)] = tree.ancestors
        parents = pad_sequence([tree.parents for tree in trees], batch_first=True, padding_value=-1)
        in_chain = parents == torch.arange(-1, rows - 1)
        return cls(
            parents=parents,
            depths=pad_sequence([tree.depths for tree in trees], batch_first=True),
            ancestors=ancestors,
            chain_rows=in_chain.long().cumprod(dim=1).sum(dim=1),
        )


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The trees of one step.

    Attributes:
        trees: every request's tree, over the rows of the step's logits.
        token: ``[rows]``, int64: each row's index among the step's tokens (vLLM's ``logits_indices``).
        depth: ``[rows]``, int64.
        queries: the trees that branch, as attention sees them; None if none does.

    """

    trees: TreeBatch
    token: torch.Tensor
    depth: torch.Tensor
    queries: TreeQueries | None

    def place(
        self,
        positions: torch.Tensor,  # [tokens], int64
    ) -> None:
        """Put each row at the position of its depth, in place; before, they have the positions of a chain."""
        root_position = positions[self.token[self.trees.root]]
        positions[self.token] = root_position[self.trees.request] + self.depth


def plan_step(
    table: TreeTable,
    kind: torch.Tensor,  # [requests], int64
    num_drafts: torch.Tensor,  # [requests], int64
    token: torch.Tensor,  # [rows], int64
    token_ids: torch.Tensor,  # [tokens], int
    seq_lens: torch.Tensor,  # [requests], int
) -> StepPlan:
    """Lay out a step's trees.

    Args:
        table: the trees that drafts may have.
        kind: which tree of the table each request's draft follows.
        num_drafts: how many of its rows, the root not counted, were scheduled; any prefix of a tree is one.
        token: each row's index among the step's tokens; a request's rows follow one another, root first.
        token_ids: the step's input tokens.
        seq_lens: each request's tokens after this step, all of its rows counted.

    """
    lengths = num_drafts + 1
    start = lengths.cumsum(0) - lengths
    request = torch.repeat_interleave(torch.arange(len(kind)), lengths)
    local = torch.arange(len(token)) - start[request]
    parent = table.parents[kind[request], local]
    depth = table.depths[kind[request], local]
    trees = TreeBatch(
        request=request,
        parent=torch.where(parent >= 0, parent + start[request], -1),
        token=token_ids[token].long(),
        root=start,
        max_depth=int(depth.max()),
    )
    branching = (lengths > table.chain_rows[kind]).nonzero().flatten()
    queries = None
    if len(branching):
        lengths, kind = lengths[branching], kind[branching]
        rows = int(lengths.max())
        last = lengths[:, None] - 1
        index = torch.arange(rows).expand(len(branching), -1).minimum(last)  # padding repeats the last row
        ancestors = table.ancestors[kind[:, None], index][:, :, :rows]
        queries = TreeQueries(
            request=branching,
            context=seq_lens[branching].long() - lengths,
            token=token[start[branching][:, None] + index],
            depth=table.depths[kind[:, None], index],
            ancestors=ancestors & (torch.arange(rows) <= last)[:, None],
        )
    return StepPlan(trees=trees, token=token, depth=depth, queries=queries)


def kv_moves(
    trees: TreeBatch,
    rows: torch.Tensor,  # [requests, levels], int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the keys and values of accepted rows lie and where an ordinary sequence has them.

    The row accepted at level j belongs right behind the root, j rows further on; in a chain it is there already.

    Args:
        trees: the step's trees.
        rows: ``Walk.rows``.

    Returns:
        Two vectors of rows, int64, source and target of each row that has to move.

    """
    target = trees.root[:, None] + torch.arange(rows.shape[1], device=rows.device)
    misplaced = (rows >= 0) & (rows != target)
    return rows[misplaced], target[misplaced]
