# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's attention backends for GPUs have a tree form."""

from __future__ import annotations

from contextlib import AbstractContextManager

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_medusa.attention.triton.flash_backend import TreeFlashAttentionBackend
from vllm_medusa.attention.triton.triton_backend import TreeTritonAttentionBackend
from vllm_medusa.compat.backends import overridden


def tree_attention_selected() -> AbstractContextManager[None]:
    """Make layers that are constructed in this context use the tree form of the backend that vLLM selects."""
    return overridden(
        {
            AttentionBackendEnum.FLASH_ATTN: TreeFlashAttentionBackend,
            AttentionBackendEnum.TRITON_ATTN: TreeTritonAttentionBackend,
        }
    )
