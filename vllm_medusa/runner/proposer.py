"""From the target's hidden state to the next step's drafts."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import get_model

from vllm_medusa.config import medusa_config
from vllm_medusa.model.heads import MedusaHeads
from vllm_medusa.tree.dynamic import DynamicTree, GrownTrees


class MedusaProposer:
    """Fills the rows of draft trees with the heads' most probable tokens.

    vLLM's ``custom_class`` method builds it (``create_custom_proposer``), as ``drafter`` of the model runner.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = medusa_config(vllm_config)
        assert options is not None
        self.vllm_config = vllm_config
        self.options = options
        self.tree = options.tree
        self.model: MedusaHeads

    def load_model(self, target_model: nn.Module) -> None:
        """Load the heads; ones without LM heads of their own share ``target_model``'s."""
        self.model = get_model(vllm_config=self.vllm_config, model_config=self.options.draft_model_config)
        self.model.share_lm_head(target_model)
        device = next(self.model.parameters()).device
        if isinstance(self.tree, DynamicTree):
            self.tree = self.tree.to(device)
        else:
            self._head = (self.tree.topology.depths[1:] - 1).to(device)
            self._rank = self.tree.ranks[1:].to(device)

    @torch.inference_mode()
    def propose(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> torch.Tensor:
        """Draft a token for every row but the root of a tree that is the same for every request.

        Args:
            hidden: the target's normed hidden state at the row where each request stopped.

        Returns:
            ``[requests, rows - 1]``, int64, in row order.

        """
        return self.model.top_tokens(hidden, self.tree.top_k)[:, self._head, self._rank]

    @torch.inference_mode()
    def propose_trees(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        chained: torch.Tensor | None,  # [requests], bool
    ) -> tuple[GrownTrees, torch.Tensor]:
        """Grow each request's tree and draft its tokens.

        Args:
            hidden: as for ``propose``.
            chained: requests whose draft must be the chain of the heads' top-1 tokens; None if there are none.

        Returns:
            The trees, and ``[requests, rows - 1]``, int64, in row order.

        """
        assert isinstance(self.tree, DynamicTree)
        log_probs, tokens = self.model.top_predictions(hidden, self.tree.top_k)
        trees = self.tree.grow(log_probs)
        if chained is not None:
            trees = GrownTrees(
                torch.where(chained[:, None], self.tree.chain, trees.candidate),
                trees.length.masked_fill(chained, self.tree.chain_length + 1),
            )
        return trees, self.tree.fill(trees.candidate, tokens)
