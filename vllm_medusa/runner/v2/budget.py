# SPDX-License-Identifier: Apache-2.0
"""The budget on V2: vLLM's adaptive verification, with trees in the place of chains.

vLLM's manager decides on the host how many of a step's drafted nodes are verified, from probabilities that are two
steps old and from step times that it measures as graphs are captured. Which of them is decided on the device, by the
newest probabilities, so only the device knows each request's number of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from vllm_medusa.budget.pauses import Gains, Pauses
from vllm_medusa.budget.tally import Tally
from vllm_medusa.config import MedusaBudget
from vllm_medusa.runner.budget_report import BudgetReport

LAG = 2
"""Steps from a draft to the one whose budget is chosen by the draft's probabilities."""

TYPICAL_RATE = 1 / 16
"""The weight of a step in the average of confidences that a new request has until its first draft is rated."""


class BudgetManager(AdaptiveVerificationManager):
    """vLLM's manager with four things more: a number as budget, room for the verifier, pauses of the heads, a report.

    All of it follows from what is the same on every rank, as the manager's own choice does.

    Args:
        budget: ``medusa_budget``: "auto", or the most nodes of all requests in a step.
        room: most nodes that a step of these requests, by state index, may verify; what exceeds it is cut.
        report: tells people what was chosen; None where another rank does.

    Attributes:
        tally: what it tells. What is expected of nodes is on the device, and is not counted.

    """

    _batch_budget: tuple[dict[str, int], dict[str, int], int] | None

    def __init__(
        self,
        *args: Any,
        budget: MedusaBudget,
        room: Callable[[np.ndarray], int],
        report: BudgetReport | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.most = budget if isinstance(budget, int) else None
        self.tally = Tally()
        self._room = room
        self._report = report
        self._pauses = Pauses()
        self._gains = Gains()
        self._asked: deque[bool] = deque(maxlen=LAG)
        self._typical = np.ones(self.num_speculative_steps, dtype=np.float32)
        # Until costs are known nothing is cut.
        states = self.req_states
        self.cost_tables = np.zeros(states.max_num_reqs + 1), np.ones(states.max_num_batched_tokens + 1)

    def set_cost_curves(self, draft_curve: list[tuple[int, float]], verify_curve: list[tuple[int, float]]) -> None:
        """Take costs; there are none where no decode step fits a graph of those that are captured."""
        if draft_curve and verify_curve:
            super().set_cost_curves(draft_curve, verify_curve)

    def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
        """Choose the step's number of nodes, and return the step's tokens."""
        total = super().get_num_tokens(num_tokens_per_req, draft_tokens)
        assert self._batch_budget is not None
        drafts, others, chosen = self._batch_budget
        num_drafts = np.fromiter(drafts.values(), dtype=np.int64)
        state_indices = np.fromiter(map(self.req_states.req_id_to_index.__getitem__, drafts), dtype=np.int64)
        base = total - chosen
        budget = chosen if self.most is None else min(self.most, int(num_drafts.sum()))
        budget = min(budget, max(self._room(state_indices), 0))
        if self.most is None and len(self._asked) == LAG and self._asked[0]:
            confidences = self._stale_confidences[self._stale_idx].np[state_indices]
            self._typical += TYPICAL_RATE * (confidences.mean(axis=0) - self._typical)
            # A step that computes prompts says little of what verification gives.
            if base == len(state_indices) and not self._pays(confidences, num_drafts, budget):
                budget = 0
            self._pauses.saw(len(state_indices), verified=budget > 0)
        self._batch_budget = drafts, others, budget
        self.tally.chose(budget)
        return base + budget

    def asks_heads(self, num_reqs: int) -> bool:
        """Whether this step, of so many requests, is to ask the heads."""
        asks = self.most is not None or self._pauses.asks_heads(num_reqs)
        self._asked.append(asks)
        self.tally.began(num_reqs)
        if asks:
            self.tally.asked_for(num_reqs * self.num_speculative_steps)
        if self._report is not None:
            self._report.report(self.tally)
        return asks

    def add_request(self, req_idx: int) -> None:
        """Expect of a new request what others are like."""
        super().add_request(req_idx)
        self._stale_confidences[self._stale_idx].np[req_idx] = self._typical

    def record_confidences(self, *args: Any) -> None:
        """Take a step's confidences; those of new requests are still expected ones in the copy that is read next."""
        new = list(self._pending_resets)
        super().record_confidences(*args)
        self._stale_confidences[self._stale_idx].np[new] = self._typical

    def _pays(
        self,
        confidences: np.ndarray,  # [num_reqs, num_nodes], float32
        num_drafts: np.ndarray,  # [num_reqs], int64
        budget: int,
    ) -> bool:
        """Whether verifying so many nodes, with the proposal, is faster than plain decoding under this load."""
        assert self.cost_tables is not None
        proposal, verification = self.cost_tables
        num_reqs = len(confidences)
        is_node = np.arange(confidences.shape[1]) < num_drafts[:, None]
        accepted = np.sort(np.cumprod(confidences, axis=1, dtype=np.float64)[is_node])[::-1][:budget].sum()
        plain = verification[num_reqs]
        speculating = proposal[num_reqs] + verification[num_reqs + budget]
        return self._gains.pays(num_reqs, (num_reqs + accepted) / num_reqs, speculating / plain)


def lacking(vllm_config: VllmConfig) -> str | None:
    """Return what keeps vLLM from verifying as many rows of a request as pay, in words; None if nothing does.

    These are the conditions under which vLLM itself refuses adaptive verification, but LoRA, which has been refused.
    """
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    reasons = {
        "whole decode steps are no CUDA graphs (enforce_eager, cudagraph_mode)": (
            compilation.cudagraph_mode is None or not compilation.cudagraph_mode.has_full_cudagraphs()
        ),
        "sampling masks are returned (return_sampling_mask)": model.return_sampling_mask,
        "routed experts are returned (enable_return_routed_experts)": vllm_config.aux_output_config.enabled,
        "steps are cut into micro-batches (enable_dbo)": vllm_config.parallel_config.use_ubatching,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
