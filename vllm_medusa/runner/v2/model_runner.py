# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's V2 model runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.utils import AttentionGroup

from vllm_medusa.attention.metadata import announce_trees, prepare_backends, tree_builders
from vllm_medusa.attention.triton.selection import fixes_lengths, tree_attention_selected
from vllm_medusa.compat.log import logger
from vllm_medusa.compat.runners import adaptive_verification, speculator
from vllm_medusa.config import MedusaSpeculativeConfig, medusa_config
from vllm_medusa.engine_checks import check_engine
from vllm_medusa.kv_cache.backend_commit import KVCommit
from vllm_medusa.kv_cache.kernel_commit import KernelCommit
from vllm_medusa.request import RequestOptions
from vllm_medusa.runner.budget_report import report_of
from vllm_medusa.runner.start_log import log_start
from vllm_medusa.runner.v2.budget import BudgetManager, lacking
from vllm_medusa.runner.v2.drafts import TreeTokensHandler
from vllm_medusa.runner.v2.sampling import TreeVerifier
from vllm_medusa.runner.v2.speculator import MedusaSpeculator
from vllm_medusa.step.derive_kernel import derive_trees_on_device
from vllm_medusa.step.trees import StepTrees, count_drafting_reqs


class MedusaModelRunner(GPUModelRunner):
    """Lets V2 verify trees: it adapts positions, attention metadata, verification and drafting, and leaves the rest.

    Nothing here waits for the device: the trees stay there from the step that drafts them to the one that verifies
    them, so asynchronous scheduling works.
    """

    speculator: MedusaSpeculator
    tree_attention_selected = staticmethod(tree_attention_selected)
    commit_class: type[KVCommit] = KernelCommit

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        options = medusa_config(vllm_config)
        assert options is not None
        check_engine(vllm_config, options.tree)
        if options.medusa_min_probability:
            raise ValueError(
                f"medusa_min_probability: {options.medusa_min_probability} cannot be heeded by vLLM's model runner V2, "
                "where every draft has as many nodes; leave it out, and let medusa_budget choose among them"
            )
        if options.medusa_budget != "off" and (reason := lacking(vllm_config)):
            _without_budget(options, reason)
        with speculator(MedusaSpeculator):
            super().__init__(vllm_config, device)
        self._options = options
        tree = self.speculator.proposer.tree
        self._asks_rule = np.zeros(self.max_num_reqs, dtype=bool)
        self._max_nodes = np.full(self.max_num_reqs, tree.num_nodes)
        self._max_depth = tree.depth
        self.draft_tokens_handler = TreeTokensHandler(self.speculator.drafts, device)
        self._buffers = StepTrees.allocate(tree.num_nodes, self.max_num_reqs, self.max_num_tokens, device)
        self._trees = self._buffers

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load target and heads, the target's attention layers with the tree backend."""
        with self.tree_attention_selected() if self.speculator.proposer.tree.branches else nullcontext():
            super().load_model(*args, **kwargs)
        self.speculator.load_model(self.model)
        assert self.sampler is not None
        self.rejection_sampler = TreeVerifier(self.sampler, self._options, self.device)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """Allocate the KV cache and note which layers own a part of it."""
        with adaptive_verification(self._make_budget, self._refuse_budget):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        tree = self.speculator.proposer.tree
        if tree.branches:
            prepare_backends(self._groups())
        for builder in tree_builders(self._groups()):
            builder.lengths_vary = self.adaptive_verification is not None
        log_start(self.vllm_config, tree, self._groups())
        announce_trees(self._groups(), self._buffers)
        # A chain's accepted rows are in place already. A model that only chains serve (MLA) may have any cache.
        self._commit = (
            self.commit_class(self.kv_cache_config, self.compilation_config.static_forward_context)
            if tree.branches
            else None
        )

    def get_draft_model(self) -> nn.Module:
        """Return the heads, for what the worker does to a draft model's weights: sleep and updates."""
        return self.speculator.proposer.model

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Add the step's new requests, and note their options."""
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            state_index = self.req_states.req_id_to_index[request.req_id]
            options = RequestOptions.of(params, self._options)
            self._asks_rule[state_index] = options.is_typical
            most = self.speculator.proposer.tree.num_nodes
            self._max_nodes[state_index] = most if options.max_nodes is None else min(options.max_nodes, most)

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Let vLLM map slots as for chains, then put each row of a tree at the position of its depth."""
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        num_drafts = input_batch.num_draft_tokens_per_req
        self._trees = derive_trees_on_device(
            self.speculator.drafts.by_state,
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            input_batch.cu_num_logits,
            input_batch.logits_indices,
            input_batch.input_ids,
            input_batch.positions,
            max_depth=self._max_depth,
            num_drafting_reqs=count_drafting_reqs(num_drafts) if num_drafts is not None else 0,
            buffers=self._buffers,
        )
        announce_trees(self._groups(), self._trees)
        self._slot_mappings = slot_mappings
        return block_tables, slot_mappings

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: GrammarOutput | None
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Walk the trees in the place of rejection sampling, and commit the accepted rows' keys and values."""
        trees, verifier = self._trees, self.rejection_sampler
        # A step's trees serve that step alone: what is built next for warm-up or capture has none.
        self._trees = self._buffers
        announce_trees(self._groups(), self._buffers)
        assert isinstance(verifier, TreeVerifier)
        verifier.trees, verifier.accepted = trees, None
        state_indices = input_batch.idx_mapping_np
        verifier.asking = self._on_device(self._asks_rule[state_indices])
        sampled = super().sample(hidden_states, input_batch, grammar_output)
        # A step without drafts is not verified; it has a row a request.
        self.speculator.stopped_at = trees.logits_indices
        if verifier.accepted is not None:
            if self.speculator.correction is not None:
                self.speculator.correction.observe(
                    trees,
                    verifier.accepted.lengths,
                    input_batch.idx_mapping,
                    input_batch.expanded_idx_mapping,
                    input_batch.expanded_local_pos,
                    self.req_states.prefill_len.gpu,
                )
            if self._commit is not None:
                self._commit(trees, verifier.accepted, list(self._slot_mappings))
            self.speculator.stopped_at = verifier.accepted.stopped_at
        limits, num_nodes = self._max_nodes[state_indices], self.speculator.proposer.tree.num_nodes
        self.speculator.max_nodes = async_tensor_h2d(limits, device=self.device) if (limits < num_nodes).any() else None
        budget = self.adaptive_verification
        self.speculator.asked = budget is None or budget.asks_heads(input_batch.num_reqs)
        return sampled

    def _make_budget(self, *args: Any, **kwargs: Any) -> BudgetManager | None:
        """Make the budget from what vLLM's manager is made from."""
        if backend := fixes_lengths(self._groups()):
            self._refuse_budget(f"FlashAttention and Triton serve one, and {backend} does not")
            return None
        report = report_of(self.vllm_config)
        return BudgetManager(*args, budget=self._options.medusa_budget, room=self._room, report=report, **kwargs)

    def _refuse_budget(self, reason: str) -> None:
        """Do without a budget."""
        _without_budget(self._options, reason)
        self.speculator.enable_adaptive_verification, self.speculator.correction = False, None

    def _room(
        self,
        state_indices: np.ndarray,  # [num_reqs], int
    ) -> int:
        """Return the most nodes that a budget may let the verifier have, of these requests."""
        assert isinstance(self.rejection_sampler, TreeVerifier)
        asking = bool(self._asks_rule[state_indices].any())
        return self.rejection_sampler.room(state_indices, self._max_depth, self.vocab_size, asking=asking)

    def _on_device(self, flags: np.ndarray) -> torch.Tensor | None:
        """Return the requests' flags, ``[num_reqs]``, bool; None if none is set, which costs no copy."""
        return async_tensor_h2d(flags, device=self.device) if flags.any() else None

    def _groups(self) -> Iterator[AttentionGroup]:
        return (group for groups in self.attn_groups for group in groups)


def _without_budget(options: MedusaSpeculativeConfig, reason: str) -> None:
    """Say that every draft is verified whole, and why.

    Raises:
        ValueError: the options ask for a budget by number.

    """
    if isinstance(options.medusa_budget, int):
        raise ValueError(
            f"medusa_budget: {options.medusa_budget} cannot be heeded by vLLM's model runner V2 in this engine: "
            f'{reason}; give "off", or fewer num_speculative_tokens'
        )
    logger.info_once("Medusa: no budget, every draft is verified whole: %s", reason)
