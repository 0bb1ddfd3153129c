# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama on the standard library's code: the target of the engine tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from tests.toy.blocks import shuffled_batches
from tests.toy.muon import Muon
from tests.toy.tokenizer import BOS_ID, EOS_ID
from vllm_medusa.progress import progress


@dataclass(frozen=True)
class TargetConfig:
    """The sizes and training settings of a small Llama.

    Attributes:
        head_dim: vLLM's CPU attention supports 32, 64 and 128, among others.
        block_length: tokens per training sequence.
        learning_rate: AdamW's, for embeddings, LM head and norms.
        matrix_learning_rate: Muon's, for all other weights.
        seed: random seed of weights and data order.

    """

    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    block_length: int = 256
    batch_size: int = 4
    steps: int = 800
    warmup_steps: int = 20
    learning_rate: float = 1e-2
    matrix_learning_rate: float = 0.03
    seed: int = 0

    def build(self) -> LlamaForCausalLM:
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                max_position_embeddings=self.max_position_embeddings,
                bos_token_id=BOS_ID,
                eos_token_id=EOS_ID,
                tie_word_embeddings=False,
            )
        )


def train_target(config: TargetConfig, blocks: torch.Tensor, show_progress: bool = True) -> LlamaForCausalLM:
    """Train a small Llama from scratch on ``[blocks, block_length]`` token ids."""
    model = config.build()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=config.matrix_learning_rate),
        AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    schedules = [
        LambdaLR(optimizer, lambda step: _linear_with_warmup(step, config.warmup_steps, config.steps))
        for optimizer in optimizers
    ]
    batches = shuffled_batches(blocks, config.batch_size, config.seed)
    with progress("Target model, steps", config.steps, show_progress) as shown:
        for _ in range(config.steps):
            tokens = next(batches)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            shown.advance(tokens=tokens.numel(), loss=loss.item())
    return model.eval()


def _linear_with_warmup(step: int, warmup: int, total: int) -> float:
    """Return the factor on the learning rate: a linear rise, a plateau, and a linear fall over the last 60 %."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * min(1.0, (total - step) / max(1.0, 0.6 * total))
