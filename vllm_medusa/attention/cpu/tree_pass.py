# SPDX-License-Identifier: Apache-2.0
"""What the backend asks of a way to attend for trees, and what such a way reads of a step."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_medusa.step.trees import StepTrees


class TreePass(Protocol):
    """The trees of some of a step's requests, prepared once a step, and the attention of their rows in every layer."""

    @classmethod
    def takes(cls, trees: StepTrees, common: CommonAttentionMetadata) -> torch.Tensor:
        """Return the requests to take in a step with branching trees, ``[trees]``, int64; others go to vLLM's op."""

    @classmethod
    def of(
        cls,
        trees: StepTrees,
        common: CommonAttentionMetadata,
        requests: torch.Tensor,  # [trees], int64
        block_size: int,
    ) -> Self:
        """Prepare the trees of these requests."""

    def attend(
        self,
        layer: CPUAttentionBackendImpl,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * head_dim]
        output: torch.Tensor,  # [tokens, heads, head_dim]
    ) -> None:
        """Write the output of the trees' rows, whose own keys and values the cache holds already."""
