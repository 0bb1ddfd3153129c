"""One decode step in the core's terms: the trees that a step verifies, whichever model runner carries it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_medusa.attention.metadata import TreeRows
from vllm_medusa.tree.batch import TreeBatch
from vllm_medusa.tree.layout import TreeLayout, TreeTable
from vllm_medusa.tree.topology import DraftTree

CHAIN, TREE = 0, 1
"""Rows of the table that ``table_of`` makes."""


def table_of(tree: DraftTree, device: torch.device | str = "cpu") -> TreeTable:
    """Return the table for an engine: the chain for drafts that have to be one, and the tree for all others."""
    return TreeTable([DraftTree.chain(len(tree) - 1), tree], device)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The trees of one step.

    Attributes:
        trees: every request's tree, over the rows of the step's logits.
        rows: where these rows are among the step's tokens.

    """

    trees: TreeBatch
    rows: TreeRows

    @property
    def token(self) -> torch.Tensor:
        """``[rows]``, int64: each row's index among the step's tokens (vLLM's ``logits_indices``)."""
        return self.rows.token

    def place(
        self,
        positions: torch.Tensor,  # [tokens], int64
    ) -> None:
        """Put each row at the position of its depth, in place; before, they have the positions of a chain."""
        positions.index_add_(0, self.token, self.rows.layout.shift)


def plan_step(
    layout: TreeLayout,
    token: torch.Tensor,  # [rows], int64
    token_ids: torch.Tensor,  # [tokens], int
    seq_lens: torch.Tensor,  # [requests], int
) -> StepPlan:
    """Put a step's tokens into its trees.

    Args:
        layout: the trees.
        token: each row's index among the step's tokens; a request's rows follow one another, root first.
        token_ids: the step's input tokens.
        seq_lens: each request's tokens after this step, all of its rows counted.

    """
    trees = TreeBatch(
        request=layout.request,
        parent=layout.parent,
        token=token_ids[token].long(),
        root=layout.root,
        max_depth=layout.max_depth,
    )
    return StepPlan(trees, TreeRows(layout, token, seq_lens))


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
