# SPDX-License-Identifier: Apache-2.0
"""Tiny random causal language models of several families, and texts that they learn in a few steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_medusa.training.heads import TrainableHeads

VOCABULARY = 16

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.05,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16))


def qwen3() -> Qwen3ForCausalLM:
    """Its LM head is the embedding."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True))


def gemma2() -> Gemma2ForCausalLM:
    """It caps its logits."""
    config = Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


def phi() -> PhiForCausalLM:
    """Its LM head has a bias."""
    model = PhiForCausalLM(PhiConfig(**(SIZES | {"num_key_value_heads": 2})))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def granite() -> GraniteForCausalLM:
    """It divides its logits."""
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


def cohere() -> CohereForCausalLM:
    """It multiplies its logits."""
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


def opt() -> OPTForCausalLM:
    """Its LM head is narrower than its layers."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=16, pad_token_id=0, init_std=0.2))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    make.__name__: make for make in (llama, qwen3, gemma2, phi, granite, cohere, opt)
}


def build(family: str) -> PreTrainedModel:
    """Return a family's model, the same each time."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def counting(blocks: int, seed: int, length: int = 24) -> torch.Tensor:
    """Texts that count up from a random token, modulo the vocabulary size: ``[blocks, length]``."""
    starts = torch.randint(VOCABULARY, (blocks, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(length)) % VOCABULARY


def all_logits(heads: TrainableHeads, hidden: torch.Tensor) -> torch.Tensor:
    """Return ``[num_heads, ..., vocab_size]`` for ``hidden`` of ``[..., hidden_size]``."""
    return torch.stack([heads.logits(head, hidden) for head in range(heads.spec.num_heads)])
