# SPDX-License-Identifier: Apache-2.0
"""The budget in V1's terms: what it asks of a step, and the clock that tells it what steps take."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from vllm.config import VllmConfig

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.budget.budget import Budget
from vllm_medusa.budget.growth import BEST_CHILD, FOLLOWED
from vllm_medusa.config import medusa_config
from vllm_medusa.runner.budget_report import BudgetReport, report_of
from vllm_medusa.runner.v1.drafts import WaitingDrafts
from vllm_medusa.step.trees import StepTrees


class StepBudget:
    """One engine's budget, and the time of the step that runs.

    A step's time is from the start of ``execute_model`` to the end of the commit; the proposal has a time of its own.

    Args:
        budget: what decides.
        report: tells people of it; None where another rank does.
        num_ranks: tensor-parallel ranks.

    """

    def __init__(self, budget: Budget, report: BudgetReport | None, num_ranks: int) -> None:
        self.budget = budget
        self._report = report
        self._num_ranks = num_ranks
        self._began = 0.0

    @classmethod
    def of(cls, vllm_config: VllmConfig, max_depth: int) -> StepBudget | None:
        """Return the budget that the engine's options ask for; None without one."""
        options = medusa_config(vllm_config)
        if options is None or options.medusa_budget == "off":
            return None
        most = options.medusa_budget if isinstance(options.medusa_budget, int) else None
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        best_child = BEST_CHILD if options.lookup_weights is None else FOLLOWED
        return cls(Budget(max_depth, most, best_child), report_of(vllm_config), num_ranks)

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def verified(self, req_ids: Sequence[str], trees: StepTrees, walk: Walk, drafts: WaitingDrafts) -> None:
        """Stop a step's clock, and learn from what was accepted of the drafts."""
        num_rows = len(trees.logits_indices)
        # The time of a step that computes a part of a prompt says nothing of rows.
        if num_rows == len(trees.depths):
            self.budget.step_took(num_rows, time.perf_counter() - self._began)
        accepted = np.zeros(num_rows, dtype=bool)
        rows, first = walk.rows.numpy(), trees.cu_num_rows.numpy()
        accepted[rows[rows >= 0]] = True
        request = np.repeat(np.arange(len(first) - 1), np.diff(first))
        node = drafts.drafted_nodes(req_ids, request, np.arange(num_rows) - first[request] - 1)
        depths = trees.depths.numpy()[trees.logits_indices.numpy()]
        self.budget.verified(req_ids, request, node, depths, accepted)
        if self._report is not None:
            self._report.report(self.budget.tally)

    def asks_heads(
        self,
        emitting: np.ndarray,  # [num_reqs], bool
        most: torch.Tensor | None,  # [num_reqs], int64
    ) -> bool:
        """Whether to draft in this step.

        Args:
            emitting: requests that are past their prompts.
            most: most nodes of each request's draft; None if none has a limit.

        """
        self.begin()
        drafting = emitting if most is None else emitting & (most.numpy() > 0)
        return self.budget.asks_heads(int(drafting.sum()))

    def least_parent(
        self,
        emitting: np.ndarray,  # [num_reqs], bool
    ) -> float:
        """Return the least probability of a node that is to have children; see ``BeamTree.draft``.

        Ranks ask their heads together, as many times, and each has measured other times; so several grow whole trees.
        """
        return self.budget.least_parent(int(emitting.sum())) if self._num_ranks == 1 else 0.0

    def proposed(self, num_reqs: int) -> None:
        """Stop the proposal's clock."""
        self.budget.proposal_took(num_reqs, time.perf_counter() - self._began)
