# SPDX-License-Identifier: Apache-2.0
"""The budget of verified nodes: drafts are cut to what pays, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_medusa.budget.choice import choose, count_most_probable
from vllm_medusa.budget.correction import Correction
from vllm_medusa.budget.cost import CostTable
from vllm_medusa.budget.growth import BEST_CHILD, Growth
from vllm_medusa.budget.pauses import Gains, Pauses
from vllm_medusa.budget.store import Costs
from vllm_medusa.budget.tally import Tally
from vllm_medusa.tree.drafts import Drafts

PROBE_AFTER = 32
"""One of so many drafts that do not seem to pay is verified in part all the same: what is never done is never timed. It
has at most as many nodes as there are requests; with the pauses between, that is one step in more than a thousand."""


class Budget:
    """Decides how much of each draft is verified.

    Args:
        max_depth: the deepest node's depth.
        most: most nodes of all requests in a step; None chooses by cost, and cuts nothing until costs are known.
        best_child: how probable the best child of a node is taken to be, given the node.

    """

    def __init__(self, max_depth: int, most: int | None = None, best_child: float = BEST_CHILD) -> None:
        self.most = most
        self.correction = Correction(max_depth)
        self.tally = Tally()
        self._max_depth = max_depth
        self._pauses = Pauses()
        self._gains = Gains()
        self._growth = Growth(best_child)
        self._verification: CostTable | None = None
        self._proposal: CostTable | None = None
        self._max_rows = 0
        self._unverified = 0
        self._draft_index: dict[str, int] = {}
        self._head_probabilities = self._corrected_probabilities = torch.zeros(0)

    def know(self, costs: Costs, max_rows: int, max_num_reqs: int) -> None:
        """Take costs as they were measured.

        Args:
            costs: see there.
            max_rows: rows of the largest step.
            max_num_reqs: requests of the largest step.

        """
        self._verification, self._proposal = (
            CostTable(costs.verification, max_rows),
            CostTable(costs.proposal, max_num_reqs),
        )
        self._max_rows = max_rows

    def asks_heads(self, num_reqs: int) -> bool:
        """Whether this step, in which so many requests can have a draft, is to ask the heads."""
        self._draft_index = {}
        if num_reqs:
            self.tally.began(num_reqs)
        return num_reqs > 0 and self._pauses.asks_heads(num_reqs)

    def least_parent(self, num_reqs: int) -> float:
        """Return the least probability, as the heads say, of a node whose children may be worth verifying.

        It is 0 where nodes are not chosen by cost.
        """
        return self._growth.least_parent(num_reqs) / float(self.correction.ratios.max())

    def cut(
        self,
        req_ids: Sequence[str],
        drafts: Drafts,
        emitting: torch.Tensor,  # [num_reqs], bool
    ) -> Drafts:
        """Cut drafts to what pays.

        Args:
            req_ids: whose drafts these are.
            drafts: with their ``log_probs``.
            emitting: requests whose drafts will be verified; those in the midst of their prompts are not.

        """
        assert drafts.log_probs is not None
        emits = emitting.tolist()
        self._draft_index = {each: index for index, each in enumerate(req_ids) if emits[index]}
        self._head_probabilities = drafts.log_probs.exp()
        lengths = drafts.lengths * emitting
        depths = node_depths(drafts.parents, self._max_depth)
        self._corrected_probabilities = self.correction.apply(self._head_probabilities, depths)
        if self.most is not None:
            chosen = count_most_probable(self._corrected_probabilities, lengths, self.most)
        else:
            chosen = self._choose(self._corrected_probabilities, lengths, len(self._draft_index))
        self.tally.asked_for(int(lengths.sum()))
        self.tally.chose(int(chosen.sum()))
        return drafts.cut(chosen)

    def _choose(
        self,
        probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32
        lengths: torch.Tensor,  # [num_reqs], int64
        num_reqs: int,
    ) -> torch.Tensor:  # [num_reqs], int64
        if self._verification is None or self._proposal is None or num_reqs >= self._max_rows:
            return lengths
        most = min(num_reqs + int(lengths.sum()), self._max_rows)
        steps = torch.from_numpy(self._verification.between(num_reqs, most))
        # The heads have been asked already, but as long as they are, each step pays for them.
        plain = float(steps[0])
        rate = max(self._gains.of(num_reqs), 1) * num_reqs / plain
        choice = choose(probabilities, lengths, num_reqs, steps + self._proposal.at(num_reqs), rate)
        self._growth.left(num_reqs, choice.left)
        if self._gains.pays(num_reqs, choice.tokens / num_reqs, choice.seconds / plain):
            return choice.lengths
        self._unverified += 1
        if self._unverified % PROBE_AFTER:
            return torch.zeros_like(lengths)
        return count_most_probable(probabilities, lengths, num_reqs)

    def verified(
        self,
        req_ids: Sequence[str],
        request: np.ndarray,  # [num_rows], int64
        node: np.ndarray,  # [num_rows], int64
        depths: np.ndarray,  # [num_rows], int64
        accepted: np.ndarray,  # [num_rows], bool
    ) -> None:
        """Learn from a step's rows.

        Args:
            req_ids: the step's requests.
            request: the index among them of each row's.
            node: the row's node in its draft; -1 for roots.
            depths: the row's depth.
            accepted: whether the walk went along the row.

        """
        draft_index = np.array([self._draft_index.get(each, -1) for each in req_ids])
        if not (draft_index >= 0).any():
            return
        draft = draft_index[request]
        known = (node >= 0) & (draft >= 0)
        nodes = draft[known], node[known]
        self.correction.observe(depths[known], self._head_probabilities.numpy()[nodes], accepted[known])
        self.tally.verified(self._corrected_probabilities.numpy()[nodes], accepted[known])
        if self.most is None:
            self._pauses.saw(len(req_ids), verified=bool(known.any()))

    def step_took(self, rows: int, seconds: float) -> None:
        """Note the time of a step in which all tokens were rows."""
        if self._verification is not None:
            self._verification.observe(rows, seconds)

    def proposal_took(self, num_reqs: int, seconds: float) -> None:
        """Note the time of a proposal."""
        if self._proposal is not None:
            self._proposal.observe(num_reqs, seconds)


def node_depths(
    parents: torch.Tensor,  # [num_reqs, num_nodes], int64
    max_depth: int,
) -> torch.Tensor:  # [num_reqs, num_nodes], int64
    """Return each node's depth, by pointer jumping; of no meaning past a draft's length, but at most ``max_depth``."""
    # NumPy, since so few numbers cost less there than in PyTorch. The root's parent is itself, so that jumps end there.
    num_reqs, num_rows = len(parents), parents.shape[1] + 1
    parent = np.zeros((num_reqs, num_rows), dtype=np.int64)
    parent[:, 1:] = parents.numpy()
    above = (parent + num_rows * np.arange(num_reqs)[:, None]).ravel()
    depths = np.ones(num_reqs * num_rows, dtype=np.int64)
    depths[::num_rows] = 0
    for _ in range(max_depth.bit_length()):
        depths += depths[above]
        above = above[above]
    return torch.from_numpy(depths.reshape(num_reqs, num_rows)[:, 1:].clip(max=max_depth))
