# SPDX-License-Identifier: Apache-2.0
"""Verification in the place of V2's rejection sampler: chunks of requests, and what is reported of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput, SamplingMaskTensors
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    _iter_request_chunks,
    get_max_chunk_logits,
)

from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.config import MedusaSpeculativeConfig
from vllm_medusa.runner.v2.walks import TreeWalker
from vllm_medusa.step.trees import StepTrees


@dataclass(frozen=True, eq=False)
class Verified:
    """What became of some requests.

    Attributes:
        accepted: where they went.
        logprobs: their tokens' log-probabilities, where these are asked for.
        masks: their tokens' sampling masks, where these are asked for.

    """

    accepted: Walk
    logprobs: LogprobsTensors | None
    masks: SamplingMaskTensors | None


@dataclass(frozen=True)
class Wanted:
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
        trees: the step's trees, set before each call.
        asking: which of the step's requests ask for typical acceptance, ``[num_reqs]``, bool, set before each call;
            None if none.
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
        self._walker = TreeWalker(sampler, options.typical, options.num_speculative_tokens + 1)
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
        verified = self._verify(logits, input_batch, trees)
        self.accepted = verified.accepted
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            verified.accepted.lengths,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=verified.accepted.tokens,
            logprobs_tensors=verified.logprobs,
            num_nans=nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=verified.masks,
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
        parts: list[Verified] = []
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
            part = self._verify_chunk(
                logits[first:last],
                chunk,
                trees.part(start, end, first, last),
                wanted,
                self.asking[start:end] if self.asking is not None else None,
            )
            parts.append(replace(part, accepted=part.accepted.shifted(first)))
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        masks = [part.masks for part in parts if part.masks is not None]
        return Verified(
            Walk.cat([part.accepted for part in parts]),
            LogprobsTensors.cat(logprobs, _starts(input_batch.num_reqs, levels)) if logprobs else None,
            SamplingMaskTensors.cat(masks) if masks else None,
        )

    def room(self, requests: np.ndarray, max_depth: int, vocab_size: int, *, asking: bool) -> int:
        """Return how many nodes can be verified in one chunk; below 0 if not even the requests' roots can.

        Args:
            requests: the requests' rows in V2's states.
            max_depth: the deepest tree's depth.
            vocab_size: logits of a row.
            asking: whether some request asks for typical acceptance.

        """
        levels = max_depth + 1
        rows = get_max_chunk_logits(vocab_size) // self._copies(requests, levels, asking=asking)
        return rows - len(requests) * levels

    def _copies(self, requests: np.ndarray, levels: int, *, asking: bool) -> int:
        """Return how many copies of its rows' logits a chunk takes."""
        if not asking:
            return 1
        # The rule reads distributions, which take as much twice over, and of paths where logits depend on them.
        return 3 * levels if self._walker.depends_on_path(requests) else 3

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
        accepted, processed = self._walker.walk(logits, input_batch, trees, asking, needs_processed)
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
        return Verified(accepted, logprobs, masks)


def _starts(num_reqs: int, levels: int) -> list[int]:
    """Return where each request's tokens start, and where the last one's end, if each has a token a level."""
    return list(range(0, num_reqs * levels + 1, levels))
