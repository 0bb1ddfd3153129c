"""The adapter to vLLM's V2 model runner."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_medusa.attention.cpu import tree_attention_selected
from vllm_medusa.attention.metadata import announce_trees, check_backends
from vllm_medusa.config import check_engine, medusa_config
from vllm_medusa.proposer import MedusaProposer
from vllm_medusa.runner.commit import KVCommit
from vllm_medusa.runner.step import CHAIN, TREE, StepPlan, TreeTable, plan_step
from vllm_medusa.runner.v2_sampling import TreeVerifier


class MedusaSpeculator(BaseSpeculator):
    """The proposer in V2's terms.

    Attributes:
        last_token: ``[requests]``, int64: index of the token at whose row each request of the step stopped.
        chained: ``[requests]``, bool: requests whose draft must be the top-1 path.

    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.proposer = MedusaProposer(vllm_config)
        self.last_token = torch.zeros(0, dtype=torch.int64)
        self.chained = torch.zeros(0, dtype=torch.bool)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing to prepare: the heads run eagerly."""

    def capture(self) -> None:
        """Nothing to capture."""

    def load_model(self, target_model: nn.Module) -> None:
        """Load the heads."""
        self.proposer.load_model(target_model)
        drafts, top_path = len(self.proposer.tree) - 1, self.proposer.tree.top_path
        self._chain_order = torch.zeros(drafts, dtype=torch.int64)
        self._chain_order[: len(top_path)] = torch.tensor(top_path, dtype=torch.int64)
        self._beyond_chain = torch.arange(drafts) >= len(top_path)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,  # [tokens, hidden_size]
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft from the hidden state of the row where each request stopped (see ``BaseSpeculator.propose``)."""
        if dummy_run:
            return self.proposer.propose(last_hidden_states[: input_batch.num_reqs])
        drafts = self.proposer.propose(last_hidden_states[self.last_token])
        chain = drafts[:, self._chain_order].masked_fill(self._beyond_chain, -1)
        return torch.where(self.chained[:, None], chain, drafts)


class MedusaModelRunner(CPUModelRunner):
    """Lets V2 verify trees: it adapts positions, attention metadata, verification and drafting, and leaves the rest."""

    speculator: MedusaSpeculator

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config, device)
        self._table = TreeTable.of(self.speculator.proposer.tree.topology)
        self._kind = np.full(self.max_num_reqs, TREE)
        self._plan: StepPlan | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load target and heads, the target's attention layers with the tree backend."""
        with tree_attention_selected():
            super().load_model(*args, **kwargs)
        self.speculator.load_model(self.model)
        assert self.sampler is not None
        self.rejection_sampler = TreeVerifier(self.sampler)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """Allocate the KV cache and note which layers own a part of it."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if not self.speculator.proposer.tree.topology.is_chain:
            check_backends(group for groups in self.attn_groups for group in groups)
        self._commit = KVCommit(self.kv_cache_config, self.compilation_config.static_forward_context)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Add the step's new requests, and note which follow a grammar, along a chain."""
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            follows_grammar = params is not None and params.structured_outputs is not None
            self._kind[self.req_states.req_id_to_index[request.req_id]] = CHAIN if follows_grammar else TREE

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Let vLLM map slots as for chains, then put each row of a tree at the position of its depth."""
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        drafts = input_batch.num_draft_tokens_per_req
        num_drafts = torch.from_numpy(drafts if drafts is not None else np.zeros(input_batch.num_reqs, dtype=np.int32))
        plan = plan_step(
            self._table,
            kind=torch.from_numpy(self._kind[input_batch.idx_mapping_np]),
            num_drafts=num_drafts.long(),
            token=input_batch.logits_indices,
            token_ids=input_batch.input_ids,
            seq_lens=input_batch.seq_lens[: input_batch.num_reqs],
        )
        # Drafts that the scheduler has padded are -1, which has no embedding and is carried by no draw.
        input_batch.input_ids.clamp_(min=0)
        plan.place(input_batch.positions)
        announce_trees((group for groups in self.attn_groups for group in groups), plan.queries)
        self._plan, self._slots = plan, slot_mappings
        return block_tables, slot_mappings

    def prepare_dummy_attn(self, *args: Any, **kwargs: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Prepare a warm-up run, which has no trees."""
        announce_trees((group for groups in self.attn_groups for group in groups), None)
        return super().prepare_dummy_attn(*args, **kwargs)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: GrammarOutput | None
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Walk the trees in the place of rejection sampling, and commit the accepted rows' keys and values."""
        plan, verifier = self._plan, self.rejection_sampler
        assert plan is not None
        assert isinstance(verifier, TreeVerifier)
        verifier.plan, verifier.accepted = plan, None
        sampled = super().sample(hidden_states, input_batch, grammar_output)
        last_row = plan.trees.root
        if verifier.accepted is not None:
            self._commit(plan, verifier.accepted, list(self._slots))
            last_row = verifier.accepted.last_row
        self.speculator.last_token = plan.token[last_row]
        self.speculator.chained = torch.from_numpy(self._kind[input_batch.idx_mapping_np] == CHAIN)
        return sampled


def _build_speculator(init: Any) -> Any:
    @wraps(init)
    def init_speculator(vllm_config: VllmConfig, *args: Any) -> Any:
        if medusa_config(vllm_config) is not None:
            return MedusaSpeculator(vllm_config)
        return init(vllm_config, *args)

    return init_speculator


# V2 builds its speculator from a closed list of methods; for any other engine the wrapper changes nothing.
model_runner.init_speculator = _build_speculator(model_runner.init_speculator)
