# SPDX-License-Identifier: Apache-2.0
"""The proposal as CUDA graphs: from the hidden states to the drafts in one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_medusa.runner.v2.texts import RequestTexts
from vllm_medusa.tree.drafts import Drafts


@dataclass(frozen=True, eq=False)
class ProposalBuffers:
    """What the graphs read and write, for as many requests as a batch can have.

    Rows beyond a batch's requests hold what earlier steps left there, and no request reads them.

    Attributes:
        hidden: ``[max_num_reqs, hidden_size]``: hidden states.
        roots: ``[max_num_reqs]``, int64: the last sampled tokens, where trees are grown or filled level by level.
        texts: the requests' texts; None where paths are not looked up.
        drafts: what is drafted from them; without ``log_probs`` where no budget asks for them.

    """

    hidden: torch.Tensor
    roots: torch.Tensor
    texts: RequestTexts | None
    drafts: Drafts

    @classmethod
    def allocate(
        cls,
        vllm_config: VllmConfig,
        num_nodes: int,
        device: torch.device,
        *,
        judged: bool,
        texts: RequestTexts | None = None,
    ) -> ProposalBuffers:
        """Allocate buffers, once for all graphs that an engine captures in its life.

        Args:
            vllm_config: the engine's.
            num_nodes: of the largest draft.
            device: where to.
            judged: whether the drafts' ``log_probs`` are kept.
            texts: see the class.

        """
        num_reqs, model = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config
        hidden = torch.zeros(num_reqs, model.get_hidden_size(), dtype=model.dtype, device=device)
        nodes = torch.zeros(num_reqs, num_nodes, dtype=torch.int64, device=device)
        roots = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        log_probs = torch.zeros(nodes.shape, device=device) if judged else None
        drafts = Drafts(nodes, torch.zeros_like(nodes), torch.zeros_like(nodes[:, 0]), log_probs)
        return cls(hidden, roots, texts, drafts)

    def inputs(self, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the first requests' hidden states, roots and text (see ``MedusaProposer.propose``)."""
        text = None if self.texts is None else self.texts.ends(num_reqs)
        return self.hidden[:num_reqs], self.roots[:num_reqs], text

    def keep(self, drafts: Drafts) -> None:
        """Copy drafts into the buffers."""
        self.drafts.tokens[: len(drafts.tokens)] = drafts.tokens
        self.drafts.parents[: len(drafts.tokens)] = drafts.parents
        self.drafts.lengths[: len(drafts.tokens)] = drafts.lengths
        if self.drafts.log_probs is not None:
            assert drafts.log_probs is not None
            self.drafts.log_probs[: len(drafts.tokens)] = drafts.log_probs

    def first(self, num_reqs: int) -> Drafts:
        """Return the first requests' drafts."""
        parts = {name: each[:num_reqs] for name, each in vars(self.drafts).items() if each is not None}
        return replace(self.drafts, **parts)


class ProposalGraphs(CudaGraphManager):
    """A graph for each number of requests up to which a batch is padded.

    The numbers are those of vLLM's capture sizes, since a proposal has one row a request. Heads have no attention, so
    they are captured whole wherever the engine captures anything.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, cudagraph_mode: CUDAGraphMode, buffers: ProposalBuffers
    ) -> None:
        mode = CUDAGraphMode.FULL_DECODE_ONLY if cudagraph_mode else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=1)
        self.buffers = buffers

    def capture_proposals(
        self,
        propose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Drafts],
    ) -> None:
        """Capture a graph for each number of requests; ``propose`` takes what ``inputs`` returns."""

        def create_forward_fn(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            def forward(_mode: CUDAGraphMode) -> None:
                self.buffers.keep(propose(*self.buffers.inputs(desc.num_reqs)))

            return forward

        self.capture(create_forward_fn, "Capturing Medusa proposals")

    def replay(self, num_reqs: int) -> Drafts | None:
        """Draft from the first hidden states and roots in the buffers.

        Returns:
            The drafts, good until the next replay; None if no graph is captured for so many requests.

        """
        desc = self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        self.run_fullgraph(desc)
        return self.buffers.first(num_reqs)
