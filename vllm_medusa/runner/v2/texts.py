# SPDX-License-Identifier: Apache-2.0
"""The requests' texts on the device, where drafts look up what followed a path before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.states import RequestState

from vllm_medusa.tree.lookup import LOOKBACK, last_tokens


@dataclass(frozen=True, eq=False)
class RequestTexts:
    """The texts of one step's requests.

    Attributes:
        states: vLLM's states of all requests, which it keeps up to date on the device.
        rows: ``[max_num_reqs]``, int64: the rows of the step's requests in these.
        length: how much of a text's end is read.

    """

    states: RequestState
    rows: torch.Tensor
    length: int

    @classmethod
    def allocate(cls, vllm_config: VllmConfig, states: RequestState, device: torch.device) -> RequestTexts:
        """Allocate the rows."""
        rows = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int64, device=device)
        return cls(states, rows, min(LOOKBACK, vllm_config.model_config.max_model_len))

    def ends(self, num_reqs: int) -> torch.Tensor:
        """Return the ends of the first requests' texts, ``[num_reqs, length]``, int32 (see ``last_tokens``)."""
        rows = self.rows[:num_reqs]
        return last_tokens(self.states.all_token_ids.gpu, rows, self.states.total_len.gpu[rows].long(), self.length)
