# SPDX-License-Identifier: Apache-2.0
"""Tokens that an acceptance rule settles on V1, read from the distributions of vLLM's own sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_medusa.acceptance.contract import Acceptance
from vllm_medusa.acceptance.typical import settle
from vllm_medusa.step.trees import StepTrees


class SettledSampler(Sampler):
    """vLLM's sampler where some tokens are settled: what it reports of a token, it reports of those too."""

    def __init__(
        self,
        sampler: Sampler,
        settled: torch.Tensor,  # [num_rows], int64: NO_TOKEN where the sampler draws
    ) -> None:
        super().__init__(sampler.logprobs_mode, sampler.use_fp64_gumbel)
        self._settled = settled
        self._here = settled

    def stand_at(
        self,
        row: torch.Tensor,  # [requests], int64
    ) -> torch.Tensor:
        """Note where each request stands at the next draw, and return what is settled there, ``[requests]``, int64."""
        self._here = self._settled[row]
        return self._here

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw for all requests, and put settled tokens in the place of draws."""
        drawn, logprobs = super().sample(logits, sampling_metadata, *args, **kwargs)
        return torch.where(self._here >= 0, self._here, drawn.long()), logprobs


class Distributions(Sampler):
    """vLLM's sampler up to its draw, of which it has none: no generator moves, not even the common one."""

    def __init__(self) -> None:
        super().__init__()
        self.topk_topp_sampler = _Undrawn()

    def log_probs(
        self,
        logits: torch.Tensor,  # [requests, vocab_size]; may be changed
        metadata: SamplingMetadata,
    ) -> torch.Tensor:  # [requests, vocab_size], float32; of no meaning for greedy requests
        """Return the logarithms of the probabilities from which the sampler would draw."""
        self(logits, replace(metadata, generators={}, max_num_logprobs=None, logprob_token_ids=None))
        return self.topk_topp_sampler.log_probs


class _Undrawn(nn.Module):
    """Stands in the place of the last step of vLLM's sampler, and keeps the distribution instead of drawing."""

    log_probs: torch.Tensor

    def forward(
        self, logits: torch.Tensor, generators: object, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        self.log_probs = apply_top_k_top_p(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device), None


class Settling:
    """Asks a rule about the nodes of some requests' trees, from the root down.

    V1's processors keep their state by request, so a round looks at one row of each request: the next one that is kept
    and has children. A request takes as many rounds as it has such rows.
    """

    def __init__(
        self,
        rule: Acceptance,
        trees: StepTrees,
        input_batch: InputBatch,
        metadata: SamplingMetadata,
        asking: torch.Tensor,  # [requests], bool
    ) -> None:
        self.rule = rule
        self.trees = trees
        self.batch = input_batch
        self.metadata = metadata
        self.asking = asking
        self.distributions = Distributions()
        self._depths = trees.depths[trees.logits_indices]
        self._paths = trees.paths()

    def tokens(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size]
    ) -> torch.Tensor:
        """Return ``acceptance.typical.settle`` of the requests that ask, ``[num_rows]``."""
        trees, num_rows = self.trees, len(self.trees.parents)
        row = torch.arange(num_rows)
        is_node = trees.parents >= 0
        request = torch.repeat_interleave(torch.diff(trees.cu_num_rows))
        is_parent = torch.zeros(num_rows, dtype=torch.bool)
        is_parent[trees.parents[is_node]] = True
        unseen = is_parent & self.asking[request]
        kept = ~is_node
        log_probs = torch.zeros(num_rows)
        # By depth, since processors may take it that an output only grows.
        order = self._depths * num_rows + row
        none = int(order.max()) + 1
        while (here := unseen & kept).any():
            first = torch.full((len(self.asking),), none).scatter_reduce_(0, request[here], order[here], "amin")
            looking = first < none
            at = torch.where(looking, first % num_rows, trees.roots.long())
            with self._outputs_along(at, looking):
                found = self.distributions.log_probs(logits[at], self.metadata)
            entropies = torch.special.entr(found.exp()).sum(dim=-1)
            below = is_node & looking[request] & (trees.parents == at[request]) & (trees.tokens >= 0)
            log_probs[below] = found[request[below], trees.tokens[below]]
            kept[below] = self.rule.keeps(log_probs[below], entropies[request[below]])
            unseen[at[looking]] = False
        return settle(trees, kept, log_probs)

    @contextmanager
    def _outputs_along(
        self,
        rows: torch.Tensor,  # [requests], int64
        looking: torch.Tensor,  # [requests], bool
    ) -> Iterator[None]:
        """Let requests' outputs end with the path to a row in this context, the root, which is there, left out."""
        added: list[tuple[list[int], int]] = []
        depths = (self._depths[rows] * looking).tolist()
        tokens_of_each = self.trees.tokens[self._paths[rows]].tolist()
        for output, tokens, depth in zip(self.batch.req_output_token_ids, tokens_of_each, depths, strict=False):
            if output is not None and depth:
                added.append((output, len(output)))
                output += tokens[1 : depth + 1]
        self._update_processors()
        try:
            yield
        finally:
            for output, length in added:
                del output[length:]
            self._update_processors()

    def _update_processors(self) -> None:
        for processor in self.metadata.logitsprocs.all:
            processor.update_state(None)
