# SPDX-License-Identifier: Apache-2.0
"""Compute a target's logits from its hidden states, with the scaling or capping that some architectures apply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from vllm_medusa.training.hidden import final_hidden_states, lm_head_of

PROBE_LENGTH = 16
TOLERANCE = 1e-2
"""The largest deviation that 16-bit rounding may cause, relative to the largest logit."""


class TargetLogits:
    """Computes a target's logits for any of its hidden states, such as a chunk.

    Some architectures scale or cap the LM head's output, and their configs name the factor differently. So all known
    transforms are tried on a few tokens, and the one that reproduces the target's own logits is used.

    Raises:
        ValueError: no known transform reproduces the target's logits.

    """

    @torch.no_grad()
    def __init__(self, target: PreTrainedModel) -> None:
        self.lm_head = lm_head_of(target)
        vocab_size = self.lm_head.weight.shape[0]
        tokens = torch.arange(PROBE_LENGTH, device=self.lm_head.weight.device)[None] % vocab_size
        was_training = target.training
        target.eval()
        expected = target(input_ids=tokens, use_cache=False).logits.float()
        plain = self.lm_head(final_hidden_states(target, tokens)).float()
        target.train(was_training)
        deviations = {
            transform: float((transform(plain) - expected).abs().max()) for transform in _known_transforms(target)
        }
        self.transform = min(deviations, key=lambda transform: deviations[transform])
        if deviations[self.transform] > TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"{type(target).__name__} transforms its logits in an unknown way, so its distribution is not known; "
                "only method 'medusa1' with heads_loss 'cross_entropy' can train heads for it"
            )

    def __call__(
        self,
        hidden: torch.Tensor,  # [..., hidden_size]
    ) -> torch.Tensor:
        return self.transform(self.lm_head(hidden))


def _known_transforms(target: PreTrainedModel) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """List the transforms that the config may mean: none, a factor (Cohere), a divisor (Granite), a cap (Gemma 2)."""
    config = target.config.get_text_config()
    transforms: list[Callable[[torch.Tensor], torch.Tensor]] = [partial(_scaled, 1.0)]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            transforms += [partial(_scaled, scale), partial(_scaled, 1 / scale)]
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        transforms.append(partial(_capped, cap))
    return transforms


def _scaled(factor: float, logits: torch.Tensor) -> torch.Tensor:
    return logits if factor == 1.0 else logits * factor


def _capped(cap: float, logits: torch.Tensor) -> torch.Tensor:
    return cap * torch.tanh(logits / cap)
