# SPDX-License-Identifier: Apache-2.0
"""The heads' LM heads, own or the target's, as vLLM's ``LogitsProcessor`` takes an LM head.

States come and logits leave as ``[heads * requests, ...]``, head by head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform


class _ProductPerHead(UnquantizedEmbeddingMethod):
    """Multiplies each head's states with its own weight: in one batched product, but one by one on CPUs.

    There each product goes through vLLM's own choice of kernel, which packs weights; a batched product in fp32 takes
    twice the time for eight requests.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create ``weight``, ``[heads, rows of the vocabulary on this rank, hidden_size]``."""
        shape = (self.num_heads, sum(output_partition_sizes), input_size_per_partition)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack each head's weight for CPUs."""
        if not current_platform.is_cpu():
            return
        # In a list, not a ModuleList: these are no parameters of their own.
        layer.parts = [nn.Module() for _ in range(self.num_heads)]
        for part, weight in zip(layer.parts, layer.weight.data, strict=True):
            part.weight = weight
            super().process_weights_after_loading(part)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,  # [heads * requests, hidden_size]
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [heads * requests, rows of the vocabulary on this rank]
        """Return this rank's logits."""
        states = x.view(self.num_heads, -1, x.shape[-1])
        if not layer.parts:
            return torch.bmm(states, layer.weight.transpose(1, 2)).flatten(0, 1)
        apply = super().apply
        return torch.cat([apply(part, each) for part, each in zip(layer.parts, states, strict=True)])

    def apply_one(
        self,
        layer: Any,
        head: int,
        x: torch.Tensor,  # [rows, hidden_size]
    ) -> torch.Tensor:  # [rows, rows of the vocabulary on this rank]
        """Return this rank's logits of one head."""
        if not layer.parts:
            return x @ layer.weight[head].T
        return super().apply(layer.parts[head], x)


class OwnLMHeads(VocabParallelEmbedding):
    """An LM head for each head, parallel over the vocabulary.

    Attributes:
        parts: on CPUs, each head's weight as it is multiplied there; otherwise none.

    """

    def __init__(self, num_heads: int, vocab_size: int, hidden_size: int, prefix: str) -> None:
        super().__init__(vocab_size, hidden_size, prefix=prefix, quant_method=_ProductPerHead(num_heads))
        self.parts: list[nn.Module] = []

    def load_head(
        self,
        head: int,
        weight: torch.Tensor,  # [vocab_size, hidden_size]
    ) -> None:
        """Load this rank's rows of one LM head; those that pad the vocabulary are zero."""
        start, end = self.shard_indices.org_vocab_start_index, self.shard_indices.org_vocab_end_index
        rows: torch.Tensor = self.weight.data[head]
        rows[: end - start] = weight[start:end]
        rows[end - start :] = 0

    def of_head(self, head: int) -> LMHeadOfOne:
        """Return one head's LM head, for states that no other head reads."""
        return LMHeadOfOne(self, head)

    def check_top_k(self, top_k: int) -> None:
        """Raise ``ValueError`` if a rank holds too few tokens to be asked for so many."""
        if top_k > self.num_embeddings_per_partition:
            raise ValueError(
                f"medusa_tree: rank {top_k - 1} is asked for, but each tensor-parallel rank holds "
                f"{self.num_embeddings_per_partition} of the heads' tokens; give smaller ranks or medusa_top_k"
            )


class LMHeadOfOne:
    """One of several LM heads, as ``LogitsProcessor`` takes an LM head; all may be one."""

    def __init__(self, lm_heads: OwnLMHeads, head: int) -> None:
        self.tp_size, self.shard_indices = lm_heads.tp_size, lm_heads.shard_indices
        self._lm_heads: Any = lm_heads
        self._head = min(head, lm_heads.quant_method.num_heads - 1)

    @property
    def quant_method(self) -> LMHeadOfOne:
        """What multiplies, in ``LogitsProcessor``'s terms."""
        return self

    def apply(
        self,
        layer: LMHeadOfOne,
        x: torch.Tensor,  # [rows, hidden_size]
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [rows, rows of the vocabulary on this rank]
        """Return this rank's logits."""
        return self._lm_heads.quant_method.apply_one(self._lm_heads, self._head, x)


class TargetLMHead:
    """The target's LM head, with all that the target does to its logits.

    No module: the target's weights are neither loaded nor moved through the heads.
    """

    tp_size = 1  # The target's logits are gathered already.
    shard_indices = SimpleNamespace(num_org_vocab_padding=0, org_vocab_start_index=0)

    def __init__(self, target: nn.Module) -> None:
        self._target: Any = target

    @property
    def quant_method(self) -> TargetLMHead:
        """What multiplies, in ``LogitsProcessor``'s terms."""
        return self

    def apply(
        self,
        layer: TargetLMHead,
        x: torch.Tensor,  # [heads * requests, hidden_size]
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [heads * requests, vocab_size]
        """Return all logits."""
        return self._target.compute_logits(x)


class CalibratedLMHead:
    """An LM head whose logits are divided by temperatures, one for each head, and are in float32.

    ``LogitsProcessor`` casts logits to float32 before it takes their log-sum-exp. The product casts them on its way, so
    that for a model in 16 bits the division is no further kernel, and rounds nothing.

    Args:
        lm_head: the LM head.
        inverse: ``[heads]``, float32: one divided by the temperatures.

    """

    def __init__(self, lm_head: Any, inverse: torch.Tensor) -> None:
        self.tp_size, self.shard_indices = lm_head.tp_size, lm_head.shard_indices
        self._lm_head, self._inverse = lm_head, inverse

    @property
    def quant_method(self) -> CalibratedLMHead:
        """What multiplies, in ``LogitsProcessor``'s terms."""
        return self

    def apply(
        self,
        layer: CalibratedLMHead,
        x: torch.Tensor,  # [heads * requests, hidden_size]
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [heads * requests, rows of the vocabulary on this rank], float32
        """Return this rank's logits."""
        logits: torch.Tensor = self._lm_head.quant_method.apply(self._lm_head, x)
        return (logits.unflatten(0, (len(self._inverse), -1)) * self._inverse[:, None, None]).flatten(0, 1)
