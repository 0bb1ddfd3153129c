# SPDX-License-Identifier: Apache-2.0
"""The proposer in the place of V2's speculator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_medusa.budget.device_correction import DeviceCorrection
from vllm_medusa.runner.proposer import MedusaProposer
from vllm_medusa.runner.v2.budget import lacking
from vllm_medusa.runner.v2.drafts import WaitingDrafts
from vllm_medusa.runner.v2.proposal_graphs import ProposalBuffers, ProposalGraphs
from vllm_medusa.runner.v2.texts import RequestTexts
from vllm_medusa.tree.drafts import NO_TOKEN, Drafts


class MedusaSpeculator(BaseSpeculator):
    """The proposer in V2's terms.

    Attributes:
        stopped_at: ``[num_reqs]``, int64: ``Walk.stopped_at`` of the step's requests.
        max_nodes: ``[num_reqs]``, int64: most nodes of each request's draft; None if none has a limit.
        asked: whether the heads are asked in this step.
        enable_adaptive_verification: whether a budget chooses how much of each draft is verified; vLLM's own name.
        correction: what the budget is told of drafts comes from here; None without one.
        draft_token_confidence_probs: ``[max_num_reqs, num_nodes]``, float32: what it is told; vLLM's own name.
        drafts: the trees of drafts that wait for their verification.
        graphs: the proposal as CUDA graphs. vLLM makes them anew, and drops those with which it measured memory.

    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState) -> None:
        self.proposer = MedusaProposer(vllm_config)
        self.drafts = WaitingDrafts(self.proposer.tree.num_nodes, vllm_config.scheduler_config.max_num_seqs, device)
        self.stopped_at: torch.Tensor | None = None
        self.max_nodes: torch.Tensor | None = None
        self.asked = True
        self.graphs: ProposalGraphs | None = None
        tree, max_num_reqs = self.proposer.tree, vllm_config.scheduler_config.max_num_seqs
        self.enable_adaptive_verification = self.proposer.options.medusa_budget != "off" and not lacking(vllm_config)
        self.correction: DeviceCorrection | None = None
        if self.enable_adaptive_verification:
            self.correction = DeviceCorrection(tree.depth, tree.num_nodes, max_num_reqs, device)
            self.draft_token_confidence_probs = torch.zeros(max_num_reqs, tree.num_nodes, device=device)
        self._buffers = ProposalBuffers.allocate(
            vllm_config,
            tree.num_nodes,
            device,
            judged=self.enable_adaptive_verification,
            texts=RequestTexts.allocate(vllm_config, req_states, device) if self.proposer.looks_up else None,
        )
        self._vllm_config, self._device = vllm_config, device

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare to capture the proposal."""
        self.graphs = ProposalGraphs(self._vllm_config, self._device, cudagraph_mode, self._buffers)

    def capture(self) -> None:
        """Capture the proposal."""
        assert self.graphs is not None
        self.graphs.capture_proposals(self.proposer.propose)

    def load_model(self, target_model: nn.Module) -> None:
        """Load the heads."""
        self.proposer.load_model(target_model)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,  # [tokens, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,  # [max_num_reqs, 1], int64
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft from the hidden state of the row where each request stopped (see ``BaseSpeculator.propose``)."""
        hidden = self._buffers.hidden[: input_batch.num_reqs]
        if dummy_run:
            return self._draft(input_batch.num_reqs).tokens
        if not self.asked:
            return self._nothing(input_batch.idx_mapping)
        assert self.stopped_at is not None
        torch.index_select(last_hidden_states, 0, self.stopped_at, out=hidden)
        if self.proposer.reads_roots:
            roots = self._buffers.roots[: input_batch.num_reqs]
            torch.index_select(last_sampled.view(-1), 0, input_batch.idx_mapping, out=roots)
        if self._buffers.texts is not None:
            self._buffers.texts.rows[: input_batch.num_reqs] = input_batch.idx_mapping
        drafts = self._draft(input_batch.num_reqs)
        if self.max_nodes is not None:
            drafts = drafts.cut(self.max_nodes)
        self.drafts.keep(input_batch.idx_mapping, drafts)
        if self.correction is not None:
            self.correction.rate(drafts, input_batch.idx_mapping, self.draft_token_confidence_probs)
        return drafts.tokens if self.max_nodes is None else drafts.padded_tokens()

    def _nothing(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs], int64
    ) -> torch.Tensor:  # [num_reqs, num_nodes], int64
        """Return drafts without a token, of which nothing is worth verifying."""
        assert self.correction is not None
        self.correction.forget(idx_mapping, self.draft_token_confidence_probs)
        return idx_mapping.new_full((len(idx_mapping), self.proposer.tree.num_nodes), NO_TOKEN)

    def _draft(self, num_reqs: int) -> Drafts:
        """Draft for the first requests in the buffers, by a captured graph if there is one."""
        captured = self.graphs.replay(num_reqs) if self.graphs is not None else None
        return captured or self.proposer.propose(*self._buffers.inputs(num_reqs))
