# SPDX-License-Identifier: Apache-2.0
"""The Medusa heads as a vLLM model: residual blocks and their LM heads, all heads at once (paper, section 2.1.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.utils import maybe_prefix

from vllm_medusa.checkpoint.config import MedusaHeadsConfig
from vllm_medusa.checkpoint.format import TOKEN_MAP, HeadsSpec, check_dtype
from vllm_medusa.checkpoint.published import HeadTensor
from vllm_medusa.messages import some_of
from vllm_medusa.model.lm_heads import CalibratedLMHead, OwnLMHeads, TargetLMHead
from vllm_medusa.model.paths import PathHeads, PathTerms
from vllm_medusa.tree.options import Tree


class LinearPerHead(nn.Module):
    """A linear layer for each head, which reads that head's states."""

    def __init__(self, num_heads: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_heads, 1, hidden_size), requires_grad=False)

    def forward(
        self,
        states: torch.Tensor,  # [heads, requests, hidden_size]
    ) -> torch.Tensor:
        """Return the layers' outputs, shaped as their input."""
        return torch.baddbmm(self.bias, states, self.weight.transpose(1, 2))


class ResidualBlocks(nn.Module):
    """``x + SiLU(W x + b)``, once per layer: all heads' transformations of the hidden state.

    All heads read the same hidden state, so their first layers are one linear layer. Every tensor-parallel rank
    computes all of it: the blocks are small beside the LM heads, and so nothing has to be gathered.
    """

    def __init__(self, num_heads: int, hidden_size: int, num_layers: int, prefix: str) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = num_heads, hidden_size
        first = ReplicatedLinear(hidden_size, num_heads * hidden_size, bias=True, prefix=f"{prefix}.layers.0")
        deeper = (LinearPerHead(num_heads, hidden_size) for _ in range(1, num_layers))
        self.layers = nn.ModuleList([first, *deeper])

    def forward(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> torch.Tensor:  # [heads, requests, hidden_size]
        """Return each head's transformed hidden states."""
        first, *deeper = self.layers
        output = silu(first(hidden)[0]).view(len(hidden), self.num_heads, self.hidden_size).transpose(0, 1)
        # Head by head in memory, as the products that follow read them.
        states = torch.empty(output.shape, dtype=output.dtype, device=output.device)
        torch.add(hidden, output, out=states)
        for layer in deeper:
            states = states + silu(layer(states))
        return states

    def of_head(self, head: int, layer: int, parameter: str) -> torch.Tensor:
        """Return the part of a layer's ``weight`` or ``bias`` that is one head's."""
        return self.layers[layer].get_parameter(parameter).data.view(self.num_heads, self.hidden_size, -1)[head]


class MedusaHeads(nn.Module):
    """K heads; head k predicts the token k positions after the one that the target's own LM head predicts.

    A checkpoint's tensors are named as in vLLM 0.32's Medusa format (``blocks.K.layers.L.weight``,
    ``lm_heads.K.weight``, optional ``token_map``); the original repository's names are understood too. Biases that the
    checkpoint leaves out are zero.

    Attributes:
        spec: the checkpoint's sizes.
        num_heads: heads that are held and run: as many as the tree is deep.

    Raises:
        ValueError: a tensor of the checkpoint is missing, is of another shape than the config says, is quantised, or
            belongs to a head or layer beyond those in the config.

    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        options: Any = vllm_config.speculative_config
        tree: Tree = options.tree
        config: MedusaHeadsConfig = options.draft_model_config.hf_config
        assert config.truncated_vocab_size is not None
        self.config = config
        self.spec = _spec_of(config)
        self.num_heads = tree.depth
        self.blocks = ResidualBlocks(
            self.num_heads, config.hidden_size, config.num_hidden_layers, maybe_prefix(prefix, "blocks")
        )
        self.lm_heads: OwnLMHeads | None = None
        self.logits_processor = LogitsProcessor(config.truncated_vocab_size)
        truncated = config.truncated_vocab_size < config.vocab_size
        if truncated or not config.original_lm_head:
            # Of a shared LM head, a truncated vocabulary's rows are in the checkpoint, once for all heads.
            self.lm_heads = OwnLMHeads(
                1 if config.original_lm_head else self.num_heads,
                config.truncated_vocab_size,
                config.hidden_size,
                maybe_prefix(prefix, "lm_heads"),
            )
            self.lm_heads.check_top_k(tree.top_k)
            self.logits_processor.scale = config.logit_scale
        self.paths: PathTerms | None = None
        if config.sequential_path_rank is not None:
            self.paths = PathTerms(
                self.num_heads, config.hidden_size, config.sequential_path_rank, maybe_prefix(prefix, "paths")
            )
        self._inverse_temperatures: torch.Tensor | None = None
        if config.medusa_temperatures is not None:
            temperatures = config.medusa_temperatures[: self.num_heads]
            self._inverse_temperatures = torch.tensor(temperatures, dtype=torch.float32).reciprocal()
        # Drafts need no finer logits than the model's dtype gives, whatever the target's own head is asked for.
        self.logits_processor.head_dtype = None
        self.token_map: torch.Tensor | None = None
        self._target: TargetLMHead | None = None
        self._embed: Callable[[torch.Tensor], torch.Tensor] | None = None

    def share(self, target: Any) -> None:
        """Let heads without LM heads of their own use the target's, and those that read paths its input embedding."""
        if self.lm_heads is None:
            self._target = TargetLMHead(target)
        if self.paths is not None:
            self._embed = target.embed_input_ids

    def forward(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> torch.Tensor:
        """Return ``[heads, requests, hidden_size]``: each head's block applied to the target's normed hidden states."""
        return self.blocks(hidden)

    def compute_logits(
        self,
        hidden: torch.Tensor,  # [heads, requests, hidden_size]
    ) -> torch.Tensor:
        """Return ``[heads, requests, truncated_vocab_size]``, gathered over tensor-parallel ranks."""
        logits = self.logits_processor(self._lm_head, hidden.flatten(0, 1))
        return logits.view(*hidden.shape[:2], -1)

    def top_tokens(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        top_k: int,
    ) -> torch.Tensor:
        """Return ``[requests, heads, top_k]``, int64: each head's most probable tokens, best first."""
        return self._top(hidden, top_k, return_log_probs=False)[1]

    def top_predictions(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens as ``top_tokens`` does, and before them their log-probabilities, float32, calibrated."""
        return self._top(hidden, top_k, return_log_probs=True)

    def by_level(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
    ) -> PathHeads:
        """Return sequential heads on these hidden states, to be asked level by level."""
        assert self.paths is not None
        assert self._embed is not None
        return PathHeads(self(hidden), self.paths.start(hidden), self.paths, self._embed, self._best_of_head)

    def _best_of_head(
        self,
        head: int,
        states: torch.Tensor,  # [rows, hidden_size]
        top_k: int,
        return_log_probs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``BestOfHead``."""
        lm_head = self._lm_head
        if isinstance(lm_head, OwnLMHeads):
            lm_head = lm_head.of_head(head)
        if return_log_probs and self._inverse_temperatures is not None:
            lm_head = CalibratedLMHead(lm_head, self._inverse_temperatures[head : head + 1])
        tokens, values = self.logits_processor.get_top_k_tokens(
            lm_head, states, top_k, return_log_probs=return_log_probs
        )
        return values, tokens if self.token_map is None else self.token_map[tokens]

    @property
    def _lm_head(self) -> Any:
        return self.lm_heads if self._target is None else self._target

    def _top(
        self,
        hidden: torch.Tensor,  # [requests, hidden_size]
        top_k: int,
        return_log_probs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # both [requests, heads, top_k]
        states, lm_head = self(hidden).flatten(0, 1), self._lm_head
        if return_log_probs and self._inverse_temperatures is not None:
            lm_head = CalibratedLMHead(lm_head, self._inverse_temperatures)
        best = self.logits_processor.get_top_k_tokens(lm_head, states, top_k, return_log_probs=return_log_probs)
        tokens, values = (each.view(self.num_heads, len(hidden), top_k).transpose(0, 1) for each in best)
        return values, tokens if self.token_map is None else self.token_map[tokens]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; see the class for names and errors."""
        parameters = dict(self.named_parameters())
        for layer in (*self.blocks.layers, *([] if self.paths is None else [self.paths.down])):
            layer.get_parameter("bias").data.zero_()
        shapes = self._shapes()
        missing = {name for name in shapes if not name.endswith(".bias")}
        for stored_name, tensor in weights:
            tensor_of_head = HeadTensor.parse(stored_name)
            name = stored_name if tensor_of_head is None else tensor_of_head.served_name
            if name == TOKEN_MAP:
                self.spec.check_token_map(tensor)
                self.token_map = tensor.to(next(iter(parameters.values())).device, torch.int64)
            elif name in shapes:
                _check_shape(name, tensor, shapes[name])
                check_dtype(name, tensor)
                if tensor_of_head is None:
                    self._load_path(name, tensor)
                else:
                    self._load(tensor_of_head, tensor)
                missing.discard(name)
            elif not (self.config.original_lm_head and name.startswith("lm_head")):
                raise ValueError(
                    f"the heads' checkpoint holds {stored_name!r}, but its config names {self.config.num_heads} heads "
                    f"of {self.config.num_hidden_layers} layers; correct num_heads and num_hidden_layers in config.json"
                )
        if self.token_map is None and self.logits_processor.vocab_size < self.config.vocab_size:
            raise ValueError(
                f"the heads' checkpoint lacks token_map, but its config names a truncated_vocab_size of "
                f"{self.config.truncated_vocab_size}; give a complete checkpoint"
            )
        if missing:
            raise ValueError(
                f"the heads' checkpoint lacks {some_of(sorted(missing), 1)}, but its config names "
                f"{self.config.num_heads} heads of {self.config.num_hidden_layers} layers; correct config.json"
            )
        return set(parameters)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that the checkpoint may hold, also of heads that the tree does not need."""
        absent = (TOKEN_MAP,) if self.lm_heads is not None else (TOKEN_MAP, "lm_heads.")
        return {name: shape for name, shape in self.spec.shapes().items() if not name.startswith(absent)}

    def _load(self, of: HeadTensor, tensor: torch.Tensor) -> None:
        if of.head >= self.num_heads:
            return
        if of.is_lm_head:
            assert self.lm_heads is not None
            self.lm_heads.load_head(of.head, tensor)
        else:
            assert of.layer is not None
            assert of.parameter is not None
            part = self.blocks.of_head(of.head, of.layer, of.parameter)
            part.copy_(tensor.view_as(part))

    def _load_path(self, name: str, tensor: torch.Tensor) -> None:
        assert self.paths is not None
        _, head, rest = name.split(".", 2)
        if int(head) < self.num_heads:
            self.paths.part(int(head), rest).copy_(tensor)


def _spec_of(config: MedusaHeadsConfig) -> HeadsSpec:
    """Return the heads' sizes, which were fitted to the target; biases that a checkpoint lacks are zero."""
    rows, vocab_size = config.truncated_vocab_size, config.vocab_size
    return HeadsSpec(
        hidden_size=config.hidden_size,
        vocab_size=vocab_size,
        num_heads=config.num_heads,
        num_layers=config.num_hidden_layers,
        shared_lm_head=config.original_lm_head,
        draft_vocab_size=None if rows == vocab_size else rows,
        path_rank=config.sequential_path_rank,
    )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"the heads' checkpoint holds {name!r} of shape {tuple(tensor.shape)}, the target needs {expected}; "
            "give heads that were trained for this target"
        )
