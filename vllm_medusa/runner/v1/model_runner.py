# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's V1 model runner, which serves CPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_medusa.acceptance.exact import Walk, walk
from vllm_medusa.attention.cpu.backend import tree_attention_selected
from vllm_medusa.attention.metadata import announce_trees, prepare_backends
from vllm_medusa.compat.runners import all_logits_processors
from vllm_medusa.config import medusa_config
from vllm_medusa.engine_checks import check_engine
from vllm_medusa.kv_cache.backend_commit import BackendCommit
from vllm_medusa.request import RequestOptions
from vllm_medusa.runner.proposer import MedusaProposer
from vllm_medusa.runner.start_log import log_start
from vllm_medusa.runner.v1.budget import StepBudget
from vllm_medusa.runner.v1.costs import known_costs
from vllm_medusa.runner.v1.drafts import WaitingDrafts
from vllm_medusa.runner.v1.sampling import TreeSampler
from vllm_medusa.step.trees import StepTrees, count_drafting_reqs, derive_trees
from vllm_medusa.structured_output.tokens import TreeTokens
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.lookup import LOOKBACK, last_tokens


class MedusaModelRunner(CPUModelRunner):
    """Lets V1 verify trees: it adapts positions, attention metadata, sampling and drafting, and leaves the rest."""

    drafter: MedusaProposer

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        options = medusa_config(vllm_config)
        assert options is not None
        check_engine(vllm_config, options.tree)
        with all_logits_processors():
            super().__init__(vllm_config, device)
        self._drafts = WaitingDrafts(self.drafter.tree.num_nodes)
        self._max_depth = self.drafter.tree.depth
        self._options = options
        self._rule = options.typical
        self._asking: set[str] = set()
        self._max_nodes: dict[str, int] = {}
        self._budget = StepBudget.of(vllm_config, self._max_depth)
        self._trees: StepTrees | None = None
        self._walk: Walk | None = None

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load target and heads, the target's attention layers with the tree backend."""
        with tree_attention_selected():
            super().load_model(load_dummy_weights)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """Allocate the KV cache and note which layers own a part of it."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.drafter.tree.branches:
            prepare_backends(self._attn_group_iterator())
        log_start(self.vllm_config, self.drafter.tree, self._attn_group_iterator())
        self._commit = BackendCommit(kv_cache_config, self.compilation_config.static_forward_context)

    def learn_costs(self) -> None:
        """Let a budget that follows costs know them; weights and KV cache are there."""
        if self._options.medusa_budget != "auto" or self._budget is None:
            return
        scheduler = self.scheduler_config
        rows = scheduler.max_num_seqs * (self.drafter.tree.num_nodes + 1)
        max_rows, max_num_reqs = (min(each, self.max_num_tokens) for each in (rows, scheduler.max_num_seqs))
        self._budget.budget.know(known_costs(self, self.drafter, max_rows, max_num_reqs), max_rows, max_num_reqs)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the model as vLLM does, and note when."""
        if self._budget is not None:
            self._budget.begin()
        return super().execute_model(*args, **kwargs)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """Forget what is known of requests that have ended, read the options of new ones, and grammars' drafts."""
        self._drafts.forget(scheduler_output.finished_req_ids)
        self._asking -= scheduler_output.finished_req_ids
        for req_id in scheduler_output.finished_req_ids:
            self._max_nodes.pop(req_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            options = RequestOptions.of(request.sampling_params, self._options)
            if options.is_typical:
                self._asking.add(request.req_id)
            if options.max_nodes is not None:
                self._max_nodes[request.req_id] = min(options.max_nodes, self.drafter.tree.num_nodes)
        self._drafts.leave_out(scheduler_output.scheduled_spec_decode_tokens)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        """Let vLLM prepare the batch as chains, then put each row of a tree at the position of its depth."""
        logits_indices, metadata, max_sampled = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        assert metadata is not None
        # vLLM has computed slots from the positions of a chain, and they stay: row i of a tree is at slot context + i.
        num_drafts = np.array(metadata.num_draft_tokens)
        num_tokens = scheduler_output.total_num_scheduled_tokens
        self._trees = derive_trees(
            self._drafts.parents(self.input_batch.req_ids),
            cu_num_rows=torch.from_numpy(np.cumsum([0, *(num_drafts + 1)])),
            logits_indices=logits_indices.long(),
            input_ids=self.input_ids.gpu[:num_tokens],
            positions=self.positions[:num_tokens],
            max_depth=self._max_depth,
            num_drafting_reqs=count_drafting_reqs(num_drafts),
        )
        return logits_indices, metadata, max_sampled

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, CommonAttentionMetadata | None]:
        """Tell the metadata builders of the step's trees; warm-up runs build before any step and have none."""
        announce_trees(self._attn_group_iterator(), self._trees)
        return super()._build_attention_metadata(*args, **kwargs)

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        """Walk the trees with the stock sampler and commit the accepted rows' keys and values."""
        assert logits is not None
        assert self._trees is not None
        trees, self._trees = self._trees, None
        discarded = torch.from_numpy(self.discard_request_mask.np[: self.input_batch.num_reqs])
        with TreeSampler(self.sampler, self.input_batch, logits, discarded) as sampler:
            if self._asking:
                asking = [req_id in self._asking for req_id in self.input_batch.req_ids]
                sampler.settle(self._rule, trees, torch.tensor(asking))
            accepted = walk(trees, sampler.draw)
        tables = self.input_batch.block_table.block_tables
        self._commit(trees, accepted, [table.slot_mapping.gpu for table in tables])
        self._walk = accepted
        if self._budget is not None:
            self._budget.verified(self.input_batch.req_ids, trees, accepted, self._drafts)
        return SamplerOutput(
            sampled_token_ids=accepted.tokens.to(torch.int32), logprobs_tensors=sampler.stacked_logprobs()
        )

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """Keep vLLM from rewinding the generators of unfinished prompts: the walk has not drawn from them."""
        generators = self.input_batch.generators
        unfinished = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        untouched = {index: generators.pop(index) for index in unfinished if index in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(untouched)

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        """Always: heads have no context, and the scheduler cuts each draft at the model's length by itself."""
        return True

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Draft from the hidden state of the row where each request stopped, as much as the budget allows."""
        assert self._walk is not None
        walked, req_ids, most = self._walk, self.input_batch.req_ids, self._most_nodes()
        emitting = ~self.discard_request_mask.np[: len(req_ids)]
        if self._budget is not None and not self._budget.asks_heads(emitting, most):
            return [[] for _ in req_ids]
        least_parent = 0.0 if self._budget is None else self._budget.least_parent(emitting)
        text = self._text() if self.drafter.looks_up else None
        drafts = self.drafter.propose(hidden_states[walked.stopped_at], walked.last_tokens, text, least_parent)
        if most is not None:
            drafts = drafts.cut(most)
        if self._budget is not None:
            self._budget.proposed(len(req_ids))
            drafts = self._budget.budget.cut(req_ids, drafts, torch.from_numpy(emitting))
        # Parents are kept of all nodes: how many of them are verified is rank 0's choice, by what it has measured.
        self._drafts.keep(req_ids, drafts)
        return self._tokens(drafts)

    def _text(self) -> torch.Tensor:
        """Return the end of each request's text, ``[num_reqs, length]`` (see ``last_tokens``)."""
        batch = self.input_batch
        lengths = torch.from_numpy(batch.num_tokens_no_spec[: batch.num_reqs]).long()
        length = min(LOOKBACK, int(lengths.max()))
        return last_tokens(batch.token_ids_cpu_tensor, torch.arange(batch.num_reqs), lengths, length)

    def _most_nodes(self) -> torch.Tensor | None:
        """Return most nodes of each request's draft, ``[num_reqs]``, int64; None if none has a limit."""
        if not self._max_nodes:
            return None
        num_nodes = self.drafter.tree.num_nodes
        return torch.tensor([self._max_nodes.get(req_id, num_nodes) for req_id in self.input_batch.req_ids])

    def _tokens(self, drafts: Drafts) -> list[list[int]]:
        """Return the drafts' tokens for vLLM; those of requests with a grammar with their trees."""
        params = (self.requests[req_id].sampling_params for req_id in self.input_batch.req_ids)
        follows = [each is not None and each.structured_outputs is not None for each in params]
        tokens = [row[:length] for row, length in zip(drafts.tokens.tolist(), drafts.lengths.tolist(), strict=True)]
        if not any(follows):
            return tokens
        trees = zip(tokens, drafts.parents.tolist(), follows, strict=True)
        return [TreeTokens(row, parents) if has_grammar else row for row, parents, has_grammar in trees]
