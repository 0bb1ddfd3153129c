# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's attention backends for GPUs have a tree form."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

from vllm_medusa.attention.triton.flash_backend import TreeFlashAttentionBackend
from vllm_medusa.attention.triton.triton_backend import TreeTritonAttentionBackend
from vllm_medusa.compat.backends import overridden

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup


def tree_attention_selected() -> AbstractContextManager[None]:
    """Make layers that are constructed in this context use the tree form of the backend that vLLM selects."""
    return overridden(
        {
            AttentionBackendEnum.FLASH_ATTN: TreeFlashAttentionBackend,
            AttentionBackendEnum.TRITON_ATTN: TreeTritonAttentionBackend,
        }
    )


def check_lengths(groups: Iterable[AttentionGroup]) -> None:
    """Refuse layers that may need to know on the host how many rows each request has.

    vLLM's other backends ask the speculative config whether they must not, and it does not say so under Medusa.

    Raises:
        ValueError: naming the backend.

    """
    for group in groups:
        builder = group.get_metadata_builder()
        if not isinstance(builder, FlashAttentionMetadataBuilder | TritonAttentionMetadataBuilder):
            raise ValueError(f"a budget is served by FlashAttention and Triton, not by {group.backend.__qualname__}")
