# SPDX-License-Identifier: Apache-2.0
"""From the target's hidden state to the next step's drafts."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import get_model

from vllm_medusa.config import medusa_config
from vllm_medusa.model.heads import MedusaHeads
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.levels import LevelHeads, PlainHeads
from vllm_medusa.tree.lookup import MERGED, LookupHeads, weights_tensor
from vllm_medusa.tree.static import StaticTree


class MedusaProposer:
    """Drafts a tree for each request from the heads' most probable tokens.

    vLLM's ``custom_class`` method builds it (``create_custom_proposer``), as ``drafter`` of the V1 model runner.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = medusa_config(vllm_config)
        assert options is not None
        self.vllm_config = vllm_config
        self.options = options
        self.tree = options.tree if options.medusa_budget == "off" else options.judged_tree
        weights = options.lookup_weights
        self._weights = None if weights is None else weights_tensor(weights)
        self.model: MedusaHeads

    def load_model(self, target_model: nn.Module) -> None:
        """Load the heads; ones without LM heads of their own share ``target_model``'s."""
        self.model = get_model(vllm_config=self.vllm_config, model_config=self.options.draft_model_config)
        self.model.share(target_model)
        device = next(self.model.parameters()).device
        self.tree = self.tree.to(device)
        if self._weights is not None:
            self._weights = self._weights.to(device)

    @property
    def looks_up(self) -> bool:
        """Whether paths are looked up in the requests' texts."""
        return self._weights is not None

    @property
    def reads_roots(self) -> bool:
        """Whether what is drafted below a node depends on the path to it, which begins with the root."""
        return self.model.paths is not None or self.looks_up

    @torch.inference_mode()
    def propose(
        self,
        hidden: torch.Tensor,  # [num_reqs, hidden_size]
        roots: torch.Tensor,  # [num_reqs], int64
        text: torch.Tensor | None = None,  # [num_reqs, length], int32
        least_parent: float = 0.0,
    ) -> Drafts:
        """Draft each request's next tokens.

        Args:
            hidden: the target's normed hidden state at the row where each request stopped.
            roots: the token that was drawn there; read where trees are grown or filled level by level.
            text: see ``tree.lookup.last_tokens``; read only where paths are looked up.
            least_parent: the least probability of a node that has children, where levels are grown one by one.

        """
        if isinstance(self.tree, BeamTree):
            return self.tree.draft(self._by_level(hidden, text), roots, least_parent)
        if self.reads_roots:
            assert isinstance(self.tree, StaticTree)
            return self.tree.draft_by_level(self._by_level(hidden, text), roots)
        if isinstance(self.tree, DynamicTree):
            log_probs, tokens = self.model.top_predictions(hidden, self.tree.top_k)
            return self.tree.draft(tokens, log_probs)
        return self.tree.draft(self.model.top_tokens(hidden, self.tree.top_k))

    def _by_level(
        self,
        hidden: torch.Tensor,  # [num_reqs, hidden_size]
        text: torch.Tensor | None,  # [num_reqs, length], int32
    ) -> LevelHeads:
        """Return what is asked level by level: the heads, with what is found in the text."""
        heads: LevelHeads
        if self.model.paths is not None:
            heads = self.model.by_level(hidden)
        else:
            heads = PlainHeads(*self.model.top_predictions(hidden, max(self.tree.top_k, MERGED)))
        if self._weights is None:
            return heads
        assert text is not None
        return LookupHeads(heads, text, self._weights, self.model.spec.vocab_size)
