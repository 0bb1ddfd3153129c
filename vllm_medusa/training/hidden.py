# SPDX-License-Identifier: Apache-2.0
"""The hidden states that the heads read: the input of the target's LM head, for any architecture."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def lm_head_of(target: PreTrainedModel) -> nn.Linear:
    """Return a target's LM head; raises ``ValueError`` if there is none, or if it is no plain ``nn.Linear``."""
    name = type(target).__name__
    lm_head = target.get_output_embeddings()
    if lm_head is None:
        raise ValueError(f"{name} has no LM head (get_output_embeddings() gives None); give a causal language model")
    if not isinstance(lm_head, nn.Linear) or not lm_head.weight.is_floating_point():
        raise ValueError(
            f"the LM head of {name}, {type(lm_head).__name__}, is no nn.Linear with a floating-point weight"
        )
    return lm_head


def embedding_of(target: PreTrainedModel) -> torch.Tensor:
    """Return a target's input embedding, ``[vocab_size, hidden_size]``, which it does not train.

    Raises:
        ValueError: it is not as wide as the hidden states, so that heads cannot read both alike.

    """
    weight = target.get_input_embeddings().weight.detach()
    width = lm_head_of(target).weight.shape[1]
    if weight.shape[1] != width or not weight.is_floating_point():
        raise ValueError(
            f"path_rank: the input embedding of {type(target).__name__} is {weight.shape[1]} wide, its hidden states "
            f"{width}; leave path_rank out"
        )
    return weight


def final_hidden_states(
    target: PreTrainedModel,
    tokens: torch.Tensor,  # [batch, length], int64
) -> torch.Tensor:
    """Return the input of the target's LM head, the states after its final norm: ``[batch, length, hidden_size]``.

    A hook on the LM head reads them. So they are what vLLM gives the heads, whatever the architecture does before or
    after. The hook passes only one position on to the LM head, which saves the logits of the others.

    Raises:
        ValueError: the target does not call its LM head once with the hidden states of all positions.

    """
    lm_head = lm_head_of(target)
    entered: list[torch.Tensor] = []

    def take(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        entered.append(arguments[0])
        return (arguments[0][:, :1], *arguments[1:])

    handle = lm_head.register_forward_pre_hook(take)
    try:
        target(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    if len(entered) != 1 or entered[0].shape[:2] != tokens.shape:
        raise ValueError(
            f"{type(target).__name__} does not give its LM head the hidden states of all tokens at once; "
            "heads cannot be trained on it"
        )
    return entered[0]
