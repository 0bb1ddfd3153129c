# SPDX-License-Identifier: Apache-2.0
"""Verification with vLLM's own V2 sampler, in the place of V2's rejection sampler.

V2's noise is keyed by seed and position, so a token drawn at a row of the tree is the one that plain decoding draws at
that position. Where no request's logits depend on the path, all rows are drawn at once and the walk looks its draws up.
Where one's do (penalties, bad words, thinking budgets, custom processors), each level is drawn by itself, with the path
so far in the place where V2's processors look for a chain of drafts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput, SamplingMaskTensors
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    _iter_request_chunks,
    get_max_chunk_logits,
)

from vllm_medusa.acceptance.exact import Walk, walk
from vllm_medusa.acceptance.typical import judge_nodes, settle
from vllm_medusa.acceptance.walk_kernel import walk_drawn
from vllm_medusa.config import MedusaSpeculativeConfig
from vllm_medusa.step.trees import StepTrees

Verified = tuple[Walk, LogprobsTensors | None, SamplingMaskTensors | None]
"""Where requests went, with their tokens' log-probabilities and sampling masks where these are asked for."""


class Wanted(NamedTuple):
    """What a batch's requests ask for besides tokens.

    Attributes:
        logprobs_dims: ``Sampler.get_logprobs_dims``.
        max_num_kept: the width of sampling masks; None without them.

    """

    logprobs_dims: tuple[int, int] | None
    max_num_kept: int | None


class TreeVerifier(RejectionSampler):
    """Takes the place of V2's rejection sampler: same call, but it walks the step's trees.

    Attributes:
        max_rows: rows of the largest tree.
        rule: the acceptance rule of requests that do not ask for the exact one.
        trees: the step's trees, set before each call.
        asking: which of the step's requests ask for ``rule``, ``[num_reqs]``, bool, set before each call; None if none.
        accepted: where the last call's walk went.

    """

    def __init__(
        self,
        sampler: Sampler,
        options: MedusaSpeculativeConfig,
        device: torch.device,
        *,
        watermark_key: int | None = None,
    ) -> None:
        super().__init__(sampler, options, device, watermark_key=watermark_key)
        self.max_rows = options.num_speculative_tokens + 1
        self.rule = options.rule("typical")
        self.asking: torch.Tensor | None = None
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
        self.accepted, logprobs, masks = self._verify(logits, input_batch, trees)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            self.accepted.lengths,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=self.accepted.tokens,
            logprobs_tensors=logprobs,
            num_nans=nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=masks,
        )

    def _verify(self, logits: torch.Tensor, input_batch: InputBatch, trees: StepTrees) -> Verified:
        """Verify in chunks of requests, as V2's rejection sampler does: drawing copies their logits, as float32."""
        sampler, requests = self.sampler, input_batch.idx_mapping_np
        # Of the whole batch, so that what chunks report can be joined.
        wanted = Wanted(
            sampler.get_logprobs_dims(requests),
            int(sampler.sampling_states.top_k.np[requests].max()) if sampler.return_sampling_mask else None,
        )
        first_row, levels = input_batch.cu_num_logits_np, trees.max_depth + 1
        # Draws by level and reports take a row a level of each request, even where its tree has fewer.
        rows = np.maximum(np.diff(first_row), levels) * self._copies(requests, levels, asking=self.asking is not None)
        chunks = list(_iter_request_chunks(np.append(0, rows.cumsum()), get_max_chunk_logits(logits.shape[1])))
        # A budget that has cut the drafts leaves the requests' rows to the device, and no more of them than one chunk.
        if len(chunks) == 1 or len(logits) != first_row[-1]:
            return self._verify_chunk(logits, input_batch, trees, wanted, self.asking)
        walks: list[Walk] = []
        logprobs: list[LogprobsTensors] = []
        masks: list[SamplingMaskTensors] = []
        for start, end in chunks:
            first, last = int(first_row[start]), int(first_row[end])
            chunk = replace(
                input_batch,
                idx_mapping=input_batch.idx_mapping[start:end],
                idx_mapping_np=input_batch.idx_mapping_np[start:end],
                expanded_idx_mapping=input_batch.expanded_idx_mapping[first:last],
                expanded_local_pos=input_batch.expanded_local_pos[first:last],
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound[start:end],
            )
            accepted, chunk_logprobs, chunk_masks = self._verify_chunk(
                logits[first:last],
                chunk,
                trees.part(start, end, first, last),
                wanted,
                self.asking[start:end] if self.asking is not None else None,
            )
            walks.append(accepted.shifted(first))
            if chunk_logprobs is not None:
                logprobs.append(chunk_logprobs)
            if chunk_masks is not None:
                masks.append(chunk_masks)
        return (
            Walk.cat(walks),
            LogprobsTensors.cat(logprobs, _starts(input_batch.num_reqs, levels)) if logprobs else None,
            SamplingMaskTensors.cat(masks) if masks else None,
        )

    def room(self, requests: np.ndarray, max_depth: int, vocab_size: int, *, asking: bool) -> int:
        """Return how many nodes can be verified in one chunk; below 0 if not even the requests' roots can.

        Args:
            requests: the requests' slots.
            max_depth: the deepest tree's depth.
            vocab_size: logits of a row.
            asking: whether some request asks for the rule.

        """
        levels = max_depth + 1
        rows = get_max_chunk_logits(vocab_size) // self._copies(requests, levels, asking=asking)
        return rows - len(requests) * levels

    def _copies(self, requests: np.ndarray, levels: int, *, asking: bool) -> int:
        """Return how many copies of its rows' logits a chunk takes."""
        if not asking:
            return 1
        # A rule reads distributions, which take as much twice over, and of paths where logits depend on them.
        return 3 * levels if self._depends_on_path(requests) else 3

    def _verify_chunk(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        trees: StepTrees,
        wanted: Wanted,
        asking: torch.Tensor | None,
    ) -> Verified:
        sampler = self.sampler
        scores_processed = wanted.logprobs_dims is not None and sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        needs_processed = scores_processed or wanted.max_num_kept is not None
        depends_on_path = self._depends_on_path(input_batch.idx_mapping_np)
        settled = None
        if asking is not None:
            settled = self._settled(logits, input_batch, trees, asking, depends_on_path)
        if depends_on_path:
            accepted, processed = self._walk_by_level(logits, input_batch, trees, settled, needs_processed)
        else:
            accepted, processed = self._walk_at_once(logits, input_batch, trees, settled, needs_processed)
        logprobs = masks = None
        num_reqs, levels = accepted.rows.shape
        if wanted.logprobs_dims is not None:
            num_logprobs, max_num_token_ids = wanted.logprobs_dims
            logprobs = compute_topk_scores(
                processed if scores_processed else logits[accepted.rows.clamp(min=0).flatten()],
                num_logprobs,
                accepted.tokens.clamp(min=0).flatten(),
                _starts(num_reqs, levels),
                logprob_token_ids_state=sampler.logprob_token_ids_state,
                expanded_idx_mapping=input_batch.idx_mapping.repeat_interleave(levels),
                max_per_req_token_ids=max_num_token_ids,
                logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
            )
        if wanted.max_num_kept is not None:
            masks = SamplingMaskTensors.from_logits(
                processed,
                torch.arange(0, num_reqs * levels + 1, levels, device=logits.device),
                accepted.lengths,
                wanted.max_num_kept,
                levels,
            )
        return accepted, logprobs, masks

    def _depends_on_path(self, requests: np.ndarray) -> bool:
        """Whether some of the requests in these slots have logits that depend on the tokens from the root to a row."""
        sampler = self.sampler
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

    def _settled(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        trees: StepTrees,
        asking: torch.Tensor,  # [num_reqs], bool
        depends_on_path: bool,
    ) -> torch.Tensor:  # [num_rows], int64: ``acceptance.typical.settle``
        """Let the rule settle tokens of the requests that ask for it."""
        row = torch.arange(logits.shape[0], device=logits.device)
        rows, local_positions = row, input_batch.expanded_local_pos
        if depends_on_path:
            # Each row at the end of a chain of its own, as V2's processors expect it: the path to it.
            paths = trees.paths()
            levels = paths.shape[1]
            rows = paths.flatten()
            local_positions = torch.arange(levels, dtype=torch.int32, device=row.device).repeat(len(row))
        processed = self.sampler.apply_sampling_params(
            logits[rows] if depends_on_path else logits,
            input_batch.expanded_idx_mapping[rows],
            input_batch.idx_mapping,
            input_batch.idx_mapping_np,
            trees.positions[rows],
            trees.tokens[rows],
            local_positions,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
        )
        if depends_on_path:
            processed = processed[row * paths.shape[1] + trees.depths[trees.logits_indices]]
        log_probs, entropies = judge_nodes(trees, processed)
        request = torch.searchsorted(trees.cu_num_rows.long(), row, right=True) - 1
        # A draft behind a prompt is one that the scheduler has made up: its tokens are what an earlier request left.
        slots = input_batch.idx_mapping
        drafted = trees.root_positions[: len(slots)] >= self.sampler.req_states.prefill_len.gpu[slots]
        kept = self.rule.keeps(log_probs, entropies) & (asking & drafted)[request]
        return settle(trees, kept, log_probs)

    def _walk_at_once(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        trees: StepTrees,
        settled: torch.Tensor | None,
        needs_processed: bool,
    ) -> tuple[Walk, torch.Tensor | None]:
        """Draw at all rows, then walk.

        Returns:
            The walk, and if needed the processed logits ``[requests * levels, vocab_size]`` of the rows on the way.

        """
        drawn, processed = self._sample(
            logits,
            input_batch,
            trees.positions,
            # Only what depends on the path reads tokens.
            trees.tokens,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            needs_processed,
        )
        if settled is not None:
            drawn = torch.where(settled >= 0, settled, drawn)
        accepted = walk_drawn(trees, drawn, self.max_rows)
        return accepted, processed[accepted.rows.clamp(min=0).flatten()] if needs_processed else None

    def _walk_by_level(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        trees: StepTrees,
        settled: torch.Tensor | None,
        needs_processed: bool,
    ) -> tuple[Walk, torch.Tensor | None]:
        """Draw at one level's rows, with the path to them, then step to the next level's (see ``_walk_at_once``)."""
        path: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []

        def draw(row: torch.Tensor, walking: torch.Tensor) -> torch.Tensor:
            path.append(row)
            levels, requests = len(path), len(row)
            rows = torch.stack(path, dim=1).flatten()
            drawn, processed = self._sample(
                logits[rows],
                input_batch,
                trees.positions[rows],
                input_batch.input_ids[trees.logits_indices[rows]],
                input_batch.idx_mapping.repeat_interleave(levels),
                torch.arange(levels, dtype=torch.int32, device=rows.device).repeat(requests),
                needs_processed,
            )
            if needs_processed:
                kept.append(processed.view(requests, levels, -1)[:, -1].clone())
            drawn = drawn.view(requests, levels)[:, -1]
            return drawn if settled is None else torch.where(settled[row] >= 0, settled[row], drawn)

        accepted = walk(trees, draw, may_wait=False)
        return accepted, torch.stack(kept, dim=1).flatten(0, 1) if needs_processed else None

    def _sample(
        self,
        logits: torch.Tensor,  # [rows, vocab_size]
        input_batch: InputBatch,
        positions: torch.Tensor,  # [rows], int64
        tokens: torch.Tensor,  # [rows], int
        request: torch.Tensor,  # [rows]: V2's expanded_idx_mapping
        local_position: torch.Tensor,  # [rows]: V2's expanded_local_pos
        needs_processed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [rows], int64; [rows, vocab_size]
        return self.sampler.sample(
            logits,
            request,
            input_batch.idx_mapping,
            input_batch.idx_mapping_np,
            positions,
            tokens,
            local_position,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
            return_logprobs=needs_processed,
        )


def _starts(num_reqs: int, levels: int) -> list[int]:
    """Return where each request's tokens start, and where the last one's end, if each has a token a level."""
    return list(range(0, num_reqs * levels + 1, levels))
