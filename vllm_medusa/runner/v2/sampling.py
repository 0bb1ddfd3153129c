# SPDX-License-Identifier: Apache-2.0
"""Verification with vLLM's own V2 sampler, in the place of V2's rejection sampler.

V2's noise is keyed by seed and position, so a token drawn at a row of the tree is the one that plain decoding draws at
that position. Where no request's logits depend on the path, all rows are drawn at once and the walk looks its draws up.
Where one's do (penalties, bad words, thinking budgets, custom processors), each level is drawn by itself, with the path
so far in the place where V2's processors look for a chain of drafts.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_medusa.acceptance.exact import Draw, Walk, walk
from vllm_medusa.acceptance.walk_kernel import walk_drawn
from vllm_medusa.step.trees import StepTrees


class TreeVerifier(RejectionSampler):
    """Takes the place of V2's rejection sampler: same call, but it walks the step's trees.

    Attributes:
        max_rows: rows of the largest tree.
        trees: the step's trees, set before each call.
        accepted: where the last call's walk went.

    """

    def __init__(
        self, sampler: Sampler, options: SpeculativeConfig, device: torch.device, *, watermark_key: int | None = None
    ) -> None:
        super().__init__(sampler, options, device, watermark_key=watermark_key)
        self.max_rows = options.num_speculative_tokens + 1
        self.trees: StepTrees | None = None
        self.accepted: Walk | None = None

    def __call__(
        self,
        logits: torch.Tensor,  # [rows, vocab_size]
        input_batch: InputBatch,
        draft_logits: None = None,
        invalid_drafts: torch.Tensor | None = None,  # [rows], bool
    ) -> SamplerOutput:
        """Draw, walk, and report as V2's rejection sampler does."""
        assert self.trees is not None
        trees = self.trees
        if invalid_drafts is not None:
            # Rows past what the grammar accepts carry masks of no meaning, so no draw may step to them.
            trees.tokens.masked_fill_(invalid_drafts, -1)
        nans = get_num_nans(logits) if self.sampler.compute_nans else None
        if self._depends_on_path(input_batch):
            self.accepted = walk(trees, self._draw_by_level(logits, input_batch, trees))
        else:
            self.accepted = walk_drawn(trees, self._draw_at_once(logits, input_batch, trees), self.max_rows)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            self.accepted.lengths.to(torch.int32),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=self.accepted.tokens,
            logprobs_tensors=self._logprobs(logits, input_batch, self.accepted),
            num_nans=nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _depends_on_path(self, input_batch: InputBatch) -> bool:
        """Whether some request's logits depend on the tokens between the root and a row."""
        requests, sampler = input_batch.idx_mapping_np, self.sampler
        for processor in sampler.logits_processors:
            match processor:
                case LogitBiasState():
                    continue
                case _ if processor is sampler.penalties_state:
                    active = processor.use_penalty[requests].any()
                case _ if hasattr(processor, "num_bad_words"):
                    active = processor.num_bad_words.np[requests].any()
                case _:
                    active = True
            if active:
                return True
        budget = sampler.thinking_budget_state
        return bool(budget.enabled and budget.use_thinking_budget[requests].any())

    def _draw_at_once(self, logits: torch.Tensor, input_batch: InputBatch, trees: StepTrees) -> torch.Tensor:
        return self._sample(
            logits,
            input_batch,
            trees.logits_indices,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
        )

    def _draw_by_level(self, logits: torch.Tensor, input_batch: InputBatch, trees: StepTrees) -> Draw:
        path: list[torch.Tensor] = []

        def draw(row: torch.Tensor, walking: torch.Tensor) -> torch.Tensor:
            path.append(row)
            levels, requests = len(path), len(row)
            rows = torch.stack(path, dim=1).flatten()
            drawn = self._sample(
                logits[rows],
                input_batch,
                trees.logits_indices[rows],
                input_batch.idx_mapping.repeat_interleave(levels),
                torch.arange(levels, dtype=torch.int32, device=rows.device).repeat(requests),
            )
            return drawn.view(requests, levels)[:, -1]

        return draw

    def _sample(
        self,
        logits: torch.Tensor,  # [rows, vocab_size]
        input_batch: InputBatch,
        token_indices: torch.Tensor,  # [rows]: indices among the step's tokens
        request: torch.Tensor,  # [rows]: V2's expanded_idx_mapping
        local_position: torch.Tensor,  # [rows]: V2's expanded_local_pos
    ) -> torch.Tensor:  # [rows], int64
        sampled, _ = self.sampler.sample(
            logits,
            request,
            input_batch.idx_mapping,
            input_batch.idx_mapping_np,
            input_batch.positions[token_indices],
            input_batch.input_ids[token_indices],
            local_position,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
        )
        return sampled.long()

    def _logprobs(self, logits: torch.Tensor, input_batch: InputBatch, accepted: Walk) -> LogprobsTensors | None:
        wanted = self.sampler.sampling_states.max_num_logprobs(input_batch.idx_mapping_np)
        if wanted == NO_LOGPROBS:
            return None
        requests, levels = accepted.rows.shape
        return compute_topk_scores(
            logits[accepted.rows.clamp(min=0).flatten()],
            wanted,
            accepted.tokens.clamp(min=0).flatten(),
            np.arange(0, (requests + 1) * levels, levels).tolist(),
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
