# SPDX-License-Identifier: Apache-2.0
"""Draws of vLLM's own V2 sampler at rows of the trees, and the walks that follow from them.

V2's noise is keyed by seed and position, so a token drawn at a row of the tree is the one that plain decoding draws at
that position. Where no request's logits depend on the path, all rows are drawn at once and the walk looks its draws up.
Where one's do (penalties, bad words, thinking budgets, custom processors), each level is drawn by itself, with the path
so far in the place where V2's processors look for a chain of drafts.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_medusa.acceptance.contract import Acceptance
from vllm_medusa.acceptance.exact import Walk, walk
from vllm_medusa.acceptance.typical import judge_nodes, settle
from vllm_medusa.acceptance.walk_kernel import walk_drawn
from vllm_medusa.step.trees import StepTrees


class TreeWalker:
    """Walks the trees of some of a step's requests.

    Args:
        sampler: draws.
        rule: the acceptance rule of requests that ask for it.
        max_rows: rows of the largest tree.

    """

    def __init__(self, sampler: Sampler, rule: Acceptance, max_rows: int) -> None:
        self._sampler = sampler
        self._rule = rule
        self._max_rows = max_rows

    def walk(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size]
        input_batch: InputBatch,
        trees: StepTrees,
        asking: torch.Tensor | None,  # [num_reqs], bool
        needs_processed: bool,
    ) -> tuple[Walk, torch.Tensor | None]:
        """Draw and walk.

        Args:
            logits: of the trees' rows.
            input_batch: the requests.
            trees: theirs.
            asking: which of them ask for the rule; None if none.
            needs_processed: whether processed logits are returned.

        Returns:
            The walk, and if needed the processed logits ``[num_reqs * levels, vocab_size]`` of the rows on the way.

        """
        depends_on_path = self.depends_on_path(input_batch.idx_mapping_np)
        settled = None
        if asking is not None:
            settled = self._settled(logits, input_batch, trees, asking, depends_on_path)
        walk_trees = self._walk_by_level if depends_on_path else self._walk_at_once
        return walk_trees(logits, input_batch, trees, settled, needs_processed)

    def depends_on_path(self, requests: np.ndarray) -> bool:
        """Whether some of these requests, rows of V2's states, have logits that depend on the path to a row."""
        sampler = self._sampler
        for processor in sampler.logits_processors:
            match processor:
                case LogitBiasState():
                    continue
                case PenaltiesState():
                    active = processor.use_penalty[requests].any()
                case BadWordsState():
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
        processed = self._sampler.apply_sampling_params(
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
        prefill_len = self._sampler.req_states.prefill_len.gpu[input_batch.idx_mapping]
        drafted = trees.root_positions[: len(prefill_len)] >= prefill_len
        kept = self._rule.keeps(log_probs, entropies) & (asking & drafted)[request]
        return settle(trees, kept, log_probs)

    def _walk_at_once(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        trees: StepTrees,
        settled: torch.Tensor | None,
        needs_processed: bool,
    ) -> tuple[Walk, torch.Tensor | None]:
        """Draw at all rows, then walk."""
        drawn, processed = self._draw(
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
        accepted = walk_drawn(trees, drawn, self._max_rows)
        return accepted, processed[accepted.rows.clamp(min=0).flatten()] if needs_processed else None

    def _walk_by_level(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        trees: StepTrees,
        settled: torch.Tensor | None,
        needs_processed: bool,
    ) -> tuple[Walk, torch.Tensor | None]:
        """Draw at one level's rows, with the path to them, then step to the next level's."""
        path: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []

        def draw(row: torch.Tensor, walking: torch.Tensor) -> torch.Tensor:
            path.append(row)
            levels, requests = len(path), len(row)
            rows = torch.stack(path, dim=1).flatten()
            drawn, processed = self._draw(
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

    def _draw(
        self,
        logits: torch.Tensor,  # [rows, vocab_size]
        input_batch: InputBatch,
        positions: torch.Tensor,  # [rows], int64
        tokens: torch.Tensor,  # [rows], int
        request: torch.Tensor,  # [rows]: V2's expanded_idx_mapping
        local_position: torch.Tensor,  # [rows]: V2's expanded_local_pos
        needs_processed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [rows], int64; [rows, vocab_size]
        return self._sampler.sample(
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
