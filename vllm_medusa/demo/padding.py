# SPDX-License-Identifier: Apache-2.0
"""Make a small model as costly as a large one without changing its outputs.

Width: all weights are padded with zeros, so the added channels stay zero. An RMSNorm then divides by the mean over H
instead of h channels; scaling its weight by sqrt(h / H) and its epsilon by h / H corrects that. Depth: a decoder layer
whose weights are zero adds nothing to the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.checkpoint.format import HeadsSpec

TOLERANCE = 1e-4


@dataclass(frozen=True)
class PaddedSizes:
    """The sizes of the padded model, named as in ``LlamaConfig``; about 190 M parameters."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 8


@torch.no_grad()
def pad_target(model: LlamaForCausalLM, sizes: PaddedSizes) -> LlamaForCausalLM:
    """Return a larger model with the same logits.

    Raises:
        ValueError: a size is smaller than the model's, or the number of query heads per key head differs.

    """
    small: LlamaConfig = model.config
    for name, size in asdict(sizes).items():
        if size < getattr(small, name):
            raise ValueError(f"{name} must be at least the model's {getattr(small, name)}, got {size}")
    group = small.num_attention_heads // small.num_key_value_heads
    if sizes.num_attention_heads != group * sizes.num_key_value_heads:
        raise ValueError(
            f"{group} query heads must share a key and value head, as in the model; "
            f"got {sizes.num_attention_heads} over {sizes.num_key_value_heads}"
        )
    ratio = small.hidden_size / sizes.hidden_size
    entries = small.to_dict() | asdict(sizes) | {"rms_norm_eps": small.rms_norm_eps * ratio}
    padded = LlamaForCausalLM(LlamaConfig.from_dict(entries)).to(model.dtype)
    weights = dict(padded.named_parameters())
    for weight in weights.values():
        weight.zero_()
    for name, weight in model.named_parameters():
        factor = ratio**0.5 if weight.ndim == 1 else 1.0
        weights[name][tuple(map(slice, weight.shape))] = weight * factor
    return padded.eval()


def pad_heads(
    spec: HeadsSpec, state: Mapping[str, torch.Tensor], hidden_size: int
) -> tuple[HeadsSpec, dict[str, torch.Tensor]]:
    """Return heads for the padded target with the same predictions."""
    wide = replace(spec, hidden_size=hidden_size)
    padded = {}
    for name, shape in wide.shapes().items():
        padded[name] = state[name].new_zeros(shape)
        padded[name][tuple(map(slice, state[name].shape))] = state[name]
    return wide, padded


@torch.no_grad()
def verify_padding(model: LlamaForCausalLM, padded: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the largest difference between the models' logits on ``[batch, length]`` tokens.

    Raises:
        ValueError: the difference is more than ``TOLERANCE``.

    """
    difference = (model(input_ids=tokens).logits - padded(input_ids=tokens).logits).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(f"the padded model's logits differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    return difference
