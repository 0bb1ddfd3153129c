# SPDX-License-Identifier: Apache-2.0
"""Draws of vLLM's own V1 sampler at rows of the trees, each as in plain decoding."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_medusa.acceptance.contract import Acceptance
from vllm_medusa.runner.v1.settling import SettledSampler, Settling
from vllm_medusa.step.trees import StepTrees


class TreeSampler:
    """The target's draws for one step: the ``draw`` of ``acceptance.exact.walk``.

    Before each level but the first, the token drawn at the level before joins the request's output and the logits
    processors update, so that penalties, bad words, ``min_tokens`` and custom processors see what they would see in
    plain decoding. The outputs are as before once the context is left.

    Attributes:
        logprobs: what the requests ask to know of each level's tokens.

    """

    def __init__(
        self,
        sampler: Sampler,
        input_batch: InputBatch,
        logits: torch.Tensor,  # [rows, vocab_size]
        discarded: torch.Tensor,  # [requests], bool
    ) -> None:
        self.sampler = sampler
        self.batch = input_batch
        self.logits = logits
        self.discarded = discarded
        self.logprobs: list[LogprobsTensors | None] = []
        self._settled: SettledSampler | None = None
        self._drawn: torch.Tensor | None = None
        self._appended: list[list[int]] = []
        # vLLM's own speculation hands the drafts to penalties; here only what the walk has accepted counts.
        self._metadata = replace(
            input_batch.sampling_metadata, spec_token_ids=[[] for _ in range(input_batch.num_reqs)]
        )
        # As vLLM's sampler casts them; on CPUs the argmax of 16 bits also takes longer than both.
        self._argmax = sampler.greedy_sample(logits.float()).long() if is_plain_greedy(self._metadata) else None

    def __enter__(self) -> TreeSampler:
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._appended:
            output.pop()

    def settle(
        self,
        rule: Acceptance,
        trees: StepTrees,
        asking: torch.Tensor,  # [requests], bool
    ) -> None:
        """Let a rule settle tokens of the requests that ask for it, before the first draw."""
        asking = asking & ~self.discarded
        if self._argmax is None and bool(asking.any()):
            settled = Settling(rule, trees, self.batch, self._metadata, asking).tokens(self.logits)
            self._settled = SettledSampler(self.sampler, settled)

    def draw(
        self,
        row: torch.Tensor,  # [requests], int64
        walking: torch.Tensor,  # [requests], bool
    ) -> torch.Tensor:
        """Draw each walking request's token at its row, or take the settled one.

        Seeded generators of requests that do not draw stay where they are.
        """
        if self._argmax is not None:
            return self._argmax[row]
        if self._drawn is not None:
            self._append(self._drawn.tolist(), walking.tolist())
        sampler, drawing = self.sampler, walking & ~self.discarded
        if self._settled is not None:
            sampler, drawing = self._settled, drawing & (self._settled.stand_at(row) < 0)
        draws = drawing.tolist()
        generators = {index: state for index, state in self._metadata.generators.items() if draws[index]}
        sampled = sampler(self.logits[row], replace(self._metadata, generators=generators))
        self.logprobs.append(sampled.logprobs_tensors)
        self._drawn = sampled.sampled_token_ids.flatten().long()
        return self._drawn

    def stacked_logprobs(self) -> LogprobsTensors | None:
        """Return the levels' log-probabilities as vLLM expects them, ``[requests * levels, ...]``."""
        if not self.logprobs or self.logprobs[0] is None:
            return None
        levels = [level for level in self.logprobs if level is not None]
        columns = zip(*(level[:3] for level in levels), strict=True)
        return LogprobsTensors(*(torch.stack(column, dim=1).flatten(0, 1) for column in columns))

    def _append(self, tokens: list[int], walking: list[bool]) -> None:
        for output, token, walks in zip(self.batch.req_output_token_ids, tokens, walking, strict=False):
            if walks and output is not None:
                output.append(token)
                self._appended.append(output)
        for processor in self._metadata.logitsprocs.all:
            processor.update_state(None)


def is_plain_greedy(metadata: SamplingMetadata) -> bool:
    """Whether every request takes the argmax of the untouched logits and nothing else is asked for."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and (holder is None or not holder.has_tracked_requests())
        and all(_is_idle(processor) for processor in metadata.logitsprocs.non_argmax_invariant)
    )


def _is_idle(processor: LogitsProcessor) -> bool:
    match processor:
        case LogitBiasLogitsProcessor():
            return not processor.biases
        case MinTokensLogitsProcessor():
            return not processor.min_toks
    return False
