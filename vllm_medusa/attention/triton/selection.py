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


def fixes_lengths(groups: Iterable[AttentionGroup]) -> str | None:
    """Return the name of a backend that may need to know on the host how many rows each request has; None for none.

    vLLM's other backends ask the speculative config whether they must not, and it does not say so under Medusa.
    """
    served = FlashAttentionMetadataBuilder | TritonAttentionMetadataBuilder
    others = (group for group in groups if not isinstance(group.get_metadata_builder(), served))
    return next((group.backend.__qualname__ for group in others), None)
