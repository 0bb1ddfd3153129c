# SPDX-License-Identifier: Apache-2.0
"""vLLM's manager of structured output, for engines whose drafts are trees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_medusa.config import medusa_config
from vllm_medusa.structured_output.pace import Pace
from vllm_medusa.structured_output.tokens import TreeTokens
from vllm_medusa.structured_output.walk import paths, reachable_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class TreeStructuredOutputManager(StructuredOutputManager):
    """Gives each row of a draft tree the mask of the path to it.

    vLLM's own takes a draft for a chain: it cuts it at the first token that the grammar forbids, and masks row i by the
    i tokens before it. Here a forbidden token ends its branch alone.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        options = medusa_config(vllm_config)
        # Drafts that follow the clock are no drafts to repeat a text by.
        self._pace = Pace() if options is not None and options.medusa_budget != "off" else None

    def validate_tokens(self, request: Request, spec_tokens: list[int]) -> list[int]:
        """Return what is left of a draft for the scheduler.

        A model runner V1 is handed the draft without the branches that the grammar forbids, and reads the tree from it.
        V2 has drafts on the device and is told their lengths only; there such branches stay, and nothing steps to them.
        """
        if not isinstance(spec_tokens, TreeTokens):
            return super().validate_tokens(request, spec_tokens)
        if not request.use_structured_output:
            return list(spec_tokens)
        draft = _draft(spec_tokens)
        most = None if self._pace is None else self._pace.most_nodes(request)
        if self.vllm_config.use_v2_model_runner:
            return draft[:most]
        return draft.of_rows(sorted(row for row, _ in self._rows(request, draft))[:most])

    def grammar_bitmask(
        self,
        requests: dict[str, Request],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: dict[str, list[int]],
    ) -> npt.NDArray[np.int32] | None:
        """Return a mask for each row, request by request, the root's first (see ``StructuredOutputManager``).

        Rows that a draw cannot get to, because a mask forbids the token of the row or of one above, allow everything.
        """
        # The roots' masks, one after the other. No draft is a tree of one row.
        roots = super().grammar_bitmask(requests, structured_output_request_ids, {})
        if roots is None:
            return None
        masks = self._grammar_bitmask
        assert masks is not None
        lengths = [len(scheduled_spec_decode_tokens.get(req_id, ())) for req_id in structured_output_request_ids]
        end = len(roots) + sum(lengths)
        for index in reversed(range(len(roots))):  # From the last on, so that none is overwritten before it moves.
            first = end - lengths[index] - 1
            masks[first] = masks[index]
            masks[first + 1 : end] = self._full_mask
            end = first
        first = 0
        for req_id, length in zip(structured_output_request_ids, lengths, strict=True):
            if length:
                self._fill(requests[req_id], _draft(scheduled_spec_decode_tokens[req_id]), masks[first:])
            first += 1 + length
        if self._pace is not None:
            self._pace.shared_by(len(roots))
        return masks[:first].numpy()

    def _fill(
        self,
        request: Request,
        draft: TreeTokens,
        masks: torch.Tensor,  # [at least 1 + num_nodes, vocab_size / 32], int32
    ) -> None:
        """Fill the masks of the rows that a draw can get to, the root left out."""
        start, filled, grammar = time.perf_counter(), 0, _grammar(request)
        for row, constrained in self._rows(request, draft):
            if constrained and not grammar.is_terminated():
                grammar.fill_bitmask(masks, row)
                filled += 1
        if self._pace is not None:
            self._pace.took(request, filled, time.perf_counter() - start)

    def _rows(self, request: Request, draft: TreeTokens) -> Iterator[tuple[int, bool]]:
        """Yield what ``reachable_rows`` does, and whether the grammar constrains the token after each row."""
        reads, constrains = [True] * len(draft), [True] * (len(draft) + 1)
        if self._get_constraint_bounds(request, ()).constraint_start > 0:
            # The request reasons, and each path may end that for itself.
            for path in paths(draft):
                bounds = self._get_constraint_bounds(request, [draft[row - 1] for row in path])
                for depth, row in enumerate(path, start=1):
                    reads[row - 1] = depth > bounds.grammar_start
                    constrains[row] = depth >= bounds.constraint_start
        for row in reachable_rows(_grammar(request), request.request_id, draft, reads):
            yield row, constrains[row]


def _draft(tokens: list[int]) -> TreeTokens:
    """Return a draft without padding; where vLLM has made it up, and it knows no tree, it is a chain."""
    draft = strip_speculative_padding(tokens)
    return draft if isinstance(draft, TreeTokens) else TreeTokens(draft, range(len(draft)))


def _grammar(request: Request) -> StructuredOutputGrammar:
    assert request.structured_output_request is not None
    grammar = request.structured_output_request.grammar
    assert isinstance(grammar, StructuredOutputGrammar)
    return grammar
