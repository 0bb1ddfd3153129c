# SPDX-License-Identifier: Apache-2.0
"""A random target with a tokenizer, its random heads, and texts to evaluate them on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.toy.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from vllm_medusa.checkpoint.format import HeadsSpec, write_heads

VOCAB, HIDDEN, HEADS = 300, 16, 3
PROMPTS = ["def f(x):", "import os", "for i in range(9): print(i)", "return"]


def write_target(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    train_tokenizer(PROMPTS * 20, VOCAB).save_pretrained(directory)
    return directory


def write_random_heads(directory: Path, vocab_size: int = VOCAB) -> Path:
    generator = torch.Generator().manual_seed(0)
    spec = HeadsSpec(HIDDEN, vocab_size, HEADS)
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()}
    return write_heads(directory, spec, state, {"base_model_name_or_path": "some/model"})
