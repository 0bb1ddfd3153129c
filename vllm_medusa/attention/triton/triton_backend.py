# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton attention with tree masks."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_medusa.attention.metadata import TreeBackendMixin, TreeMetadataBuilder
from vllm_medusa.attention.triton.backend import TreeBuilderMixin, TreeImplMixin


class TreeTritonAttentionMetadataBuilder(TreeBuilderMixin, TreeMetadataBuilder, TritonAttentionMetadataBuilder):
    """The builder of vLLM's Triton backend with tree masks."""


class TreeTritonAttentionImpl(TreeImplMixin, TritonAttentionImpl):
    """vLLM's Triton attention for prompts and plain decodes."""


class TreeTritonAttentionBackend(TreeBackendMixin, TritonAttentionBackend):
    """vLLM's Triton backend with tree masks."""

    tree_impl, tree_builder = TreeTritonAttentionImpl, TreeTritonAttentionMetadataBuilder
