# SPDX-License-Identifier: Apache-2.0
"""The Medusa heads as a vLLM model: K residual blocks and their LM heads, tensor-parallel (paper, section 2.1.1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from vllm_medusa.checkpoint.config import MedusaHeadsConfig
from vllm_medusa.checkpoint.published import HeadTensor


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``, once per layer: one head's transformation of the hidden state."""

    def __init__(self, hidden_size: int, num_layers: int, prefix: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ColumnParallelLinear(
                hidden_size, hidden_size, bias=True, gather_output=True, prefix=f"{prefix}.layers.{layer}"
            )
            for layer in range(num_layers)
        )
        self.act = nn.SiLU()

    def forward(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> torch.Tensor:
        """Return the block's output, shaped as its input."""
        for layer in self.layers:
            hidden = hidden + self.act(layer(hidden)[0])
        return hidden


class MedusaHeads(nn.Module):
    """K heads; head k predicts the token k positions after the one that the target's own LM head predicts.

    Weights are named as in vLLM 0.32's Medusa format (``blocks.K.layers.L.weight``, ``lm_heads.K.weight``, optional
    ``token_map``); the original repository's names are understood too. Biases that the checkpoint leaves out are zero.

    Raises:
        ValueError: a tensor of the checkpoint is missing, is of another shape than the config says, or belongs to a
            head or layer beyond those in the config.

    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        config: MedusaHeadsConfig = vllm_config.speculative_config.draft_model_config.hf_config
        assert config.truncated_vocab_size is not None
        self.config = config
        self.blocks = nn.ModuleList(
            ResidualBlock(config.hidden_size, config.num_hidden_layers, maybe_prefix(prefix, f"blocks.{head}"))
            for head in range(config.num_heads)
        )
        self.lm_heads = nn.ModuleList(
            ParallelLMHead(
                config.truncated_vocab_size,
                config.hidden_size,
                prefix=maybe_prefix(prefix, f"lm_heads.{head}"),
            )
            for head in range(0 if config.original_lm_head else config.num_heads)
        )
        self.logits_processor = LogitsProcessor(config.truncated_vocab_size, scale=config.logit_scale)
        self.token_map: torch.Tensor | None = None
        self._target: nn.Module | None = None

    def share_lm_head(self, target: nn.Module) -> None:
        """Let heads without LM heads of their own use the target's."""
        if self.config.original_lm_head:
            # Not a submodule: the target's weights are neither loaded nor moved through the heads.
            object.__setattr__(self, "_target", target)

    def forward(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> torch.Tensor:
        """Return ``[heads, requests, hidden_size]``: each head's block applied to the target's normed hidden states."""
        return torch.stack([block(hidden) for block in self.blocks])

    def compute_logits(
        self,
        hidden: torch.Tensor,  # [heads, requests, hidden_size]
    ) -> torch.Tensor:
        """Return ``[heads, requests, truncated_vocab_size]``, gathered over tensor-parallel ranks."""
        if self._target is not None:
            heads, requests, _ = hidden.shape
            return self._target.compute_logits(hidden.flatten(0, 1)).view(heads, requests, -1)  # type: ignore[operator]
        return torch.stack(
            [self.logits_processor(head, states) for head, states in zip(self.lm_heads, hidden, strict=True)]
        )

    def top_tokens(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        top_k: int,
    ) -> torch.Tensor:
        """Return ``[requests, heads, top_k]``, int64: each head's most probable tokens, best first."""
        return self._tokens(self.compute_logits(self(hidden)).topk(top_k, dim=-1).indices)

    def top_predictions(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens as ``top_tokens`` does, and before them their log-probabilities, float32."""
        logits = self.compute_logits(self(hidden)).float()
        best = logits.topk(top_k, dim=-1)
        log_probs = best.values - logits.logsumexp(dim=-1, keepdim=True)
        return log_probs.transpose(0, 1), self._tokens(best.indices)

    def _tokens(
        self,
        indices: torch.Tensor,  # [heads, requests, top_k], int64
    ) -> torch.Tensor:  # [requests, heads, top_k], int64
        tokens = indices.transpose(0, 1)
        return tokens if self.token_map is None else self.token_map[tokens]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; see the class for names and errors."""
        parameters = dict(self.named_parameters())
        loaded = {name for name in parameters if name.endswith(".bias")}
        for parameter in (parameters[name] for name in loaded):
            parameter.data.zero_()
        for stored_name, tensor in weights:
            tensor_of_head = HeadTensor.parse(stored_name)
            name = stored_name if tensor_of_head is None else tensor_of_head.served_name
            if name == "token_map":
                self.token_map = self._checked_map(tensor).to(next(iter(parameters.values())).device, torch.int64)
            elif name in parameters:
                self._load(name, parameters[name], tensor)
                loaded.add(name)
            elif not (self.config.original_lm_head and name.startswith("lm_head")):
                raise ValueError(
                    f"the heads' checkpoint holds {stored_name!r}, but its config names {self.config.num_heads} heads "
                    f"of {self.config.num_hidden_layers} layers; correct num_heads and num_hidden_layers in config.json"
                )
        if missing := sorted(parameters.keys() - loaded):
            raise ValueError(
                f"the heads' checkpoint lacks {missing[0]!r} and {len(missing) - 1} more, but its config names "
                f"{self.config.num_heads} heads of {self.config.num_hidden_layers} layers; correct config.json"
            )
        return loaded

    def _checked_map(self, token_map: torch.Tensor) -> torch.Tensor:
        rows, vocab = self.config.truncated_vocab_size, self.config.vocab_size
        if tuple(token_map.shape) != (rows,) or not bool(((token_map >= 0) & (token_map < vocab)).all()):
            raise ValueError(
                f"the heads' checkpoint holds a token_map of shape {tuple(token_map.shape)} with tokens "
                f"{token_map.flatten()[:3].tolist()}...; it must have {rows} of the target's {vocab} tokens"
            )
        return token_map

    def _load(self, name: str, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        hidden, rows = self.config.hidden_size, self.config.truncated_vocab_size
        if name.startswith("lm_heads."):
            expected: tuple[int | None, ...] = (rows, hidden)
        else:
            expected = (hidden,) if name.endswith(".bias") else (hidden, hidden)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"the heads' checkpoint holds {name!r} of shape {tuple(tensor.shape)}, the target needs {expected}; "
                "give heads that were trained for this target"
            )
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
