"""Medusa-1: the heads are trained, the target is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vllm_medusa.model.checkpoint import HeadsSpec
from vllm_medusa.training.accuracy import RankAccuracy
from vllm_medusa.training.data import shuffled_batches
from vllm_medusa.training.heads import MedusaHeads
from vllm_medusa.training.losses import IGNORED, medusa_loss
from vllm_medusa.training.progress import training_progress
from vllm_medusa.training.schedule import cosine_with_warmup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Medusa1Config:
    """The settings of a Medusa-1 run.

    Attributes:
        num_heads: heads to train.
        num_layers: residual layers per head.
        shared_lm_head: keep the target's LM head for all heads and train the residual layers only.
        steps: optimizer steps.
        batch_size: blocks per step.
        learning_rate: the highest rate, reached after the warm-up.
        warmup_steps: steps over which the rate rises.
        weight_decay: AdamW's.
        max_grad_norm: gradients longer than this are shortened to it.
        decay: the loss weight of head k is ``decay ** k``.
        ranks: how many of each head's most likely tokens the held-out accuracy looks at.
        prompt_length: tokens at the start of each block that the heads need not foretell, such as a prompt.
        seed: what the order of the blocks depends on.

    Raises:
        ValueError: a value is out of range.

    """

    num_heads: int = 4
    num_layers: int = 1
    shared_lm_head: bool = False
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    decay: float = 0.8
    ranks: int = 10
    prompt_length: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers", "steps", "batch_size", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must be within 0..{self.steps} (steps), got {self.warmup_steps}")
        for name in ("weight_decay", "prompt_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be within (0, 1], got {self.decay}")


@dataclass(frozen=True, eq=False)
class Medusa1Result:
    """What a run gives.

    Attributes:
        heads: the trained heads.
        accuracies: ``[heads, ranks]``: how often, on held-out blocks, the right token is a head's choice of that rank.

    """

    heads: MedusaHeads
    accuracies: torch.Tensor

    @property
    def top1(self) -> list[float]:
        """Each head's top-1 accuracy on held-out blocks."""
        return self.accuracies[:, 0].tolist()


def train_medusa1(
    target: PreTrainedModel,
    blocks: torch.Tensor,
    held_out: torch.Tensor,
    config: Medusa1Config,
    show_progress: bool = True,
) -> Medusa1Result:
    """Train heads on a frozen target.

    Args:
        target: a causal language model of ``transformers``.
        blocks: ``[blocks, length]``, int64: the token ids to train on.
        held_out: ``[blocks, length]``, int64: the token ids to judge the heads on.
        config: the run's settings.
        show_progress: whether to draw a progress bar.

    Returns:
        The heads, on the target's device, and their accuracies on ``held_out``.

    """
    lm_head = target.get_output_embeddings().weight
    spec = HeadsSpec(
        hidden_size=lm_head.shape[1],
        vocab_size=lm_head.shape[0],
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        shared_lm_head=config.shared_lm_head,
    )
    heads = MedusaHeads(spec, lm_head).to(lm_head.device)
    trained = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = LambdaLR(optimizer, partial(cosine_with_warmup, warmup=config.warmup_steps, total=config.steps))
    batches = shuffled_batches(blocks, config.batch_size, config.seed)
    with training_progress("Medusa heads", config.steps, show_progress) as report:
        for _ in range(config.steps):
            tokens = next(batches).to(lm_head.device)
            labels = labels_of(tokens, config.prompt_length)
            loss = medusa_loss(heads, final_hidden_states(target, tokens), labels, config.decay)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            report(loss.item())
    return Medusa1Result(heads, held_out_accuracies(target, heads, held_out, config))


def held_out_accuracies(
    target: PreTrainedModel, heads: MedusaHeads, held_out: torch.Tensor, config: Medusa1Config
) -> torch.Tensor:
    """``[heads, ranks]``: how often the right token is each head's choice of exactly that rank."""
    accuracy = RankAccuracy(heads, config.ranks)
    device = target.get_output_embeddings().weight.device
    for batch in held_out.split(config.batch_size):
        tokens = batch.to(device)
        accuracy.add(final_hidden_states(target, tokens), labels_of(tokens, config.prompt_length))
    return accuracy.result()


def labels_of(tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Return ``[batch, length]`` of labels: the tokens, without those of the prompts at their start."""
    labels = tokens.clone()
    labels[:, :prompt_length] = IGNORED
    return labels


@torch.no_grad()
def final_hidden_states(target: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return what goes into the target's LM head, after its final norm: ``[batch, length, hidden_size]``."""
    return target.base_model(input_ids=tokens, use_cache=False).last_hidden_state
