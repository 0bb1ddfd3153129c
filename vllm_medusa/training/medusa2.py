# SPDX-License-Identifier: Apache-2.0
"""Medusa-2: the heads and the target are trained together (paper, sections 2.2.2 and 2.3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from vllm_medusa.training.accuracy import score_target
from vllm_medusa.training.config import HeadsLoss, Medusa2Recipe
from vllm_medusa.training.draft_vocabulary import DraftVocabulary
from vllm_medusa.training.hidden import final_hidden_states
from vllm_medusa.training.losses import LabelCounts, distillation_loss, lm_loss, medusa_loss
from vllm_medusa.training.medusa1 import evaluate_batch, untrained_heads
from vllm_medusa.training.schedule import second_stage, sine_rise
from vllm_medusa.training.target_logits import TargetLogits
from vllm_medusa.training.teacher import Teacher
from vllm_medusa.training.trainer import MedusaTrainer, ParameterGroup, is_of_heads


@dataclass(frozen=True)
class LossWeights:
    """The joint loss of one step: ``target * L_LM + heads * L_heads``; ``target`` 0 freezes the target."""

    target: float
    heads: float


class Medusa2(nn.Module):
    """A target, with LoRA adapters or trained whole, and its heads, with the arguments of ``Medusa1``.

    Heads that learn the target's distribution learn it as it is at that step; no gradient reaches the target by it.

    Raises:
        ValueError: the target cannot be trained.

    """

    def __init__(
        self,
        target: PreTrainedModel,
        recipe: Medusa2Recipe,
        vocabulary: DraftVocabulary | None = None,
        learns: HeadsLoss = "cross_entropy",
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.heads = untrained_heads(target, recipe, vocabulary)
        self.target: Any = target.requires_grad_(True)
        if recipe.target_training == "lora":
            self.target = with_adapters(target, recipe)
        self.logits = TargetLogits(self.target)
        self.teacher = Teacher(self.logits, recipe.chunk_size) if learns == "kl" else None
        self._no_split_modules = target._no_split_modules  # accelerate's FSDP wraps these modules.

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, length], int64
        labels: torch.Tensor,  # [batch, length], int64
        weights: LossWeights,
        counts: LabelCounts | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the batch's share of the step's joint loss and of its parts.

        In evaluation mode, return the loss and the arguments of ``HeldOut.of`` in their order.
        """
        if not self.training:
            return self._evaluate(input_ids, labels, weights)
        frozen = weights.target == 0
        self.target.train(not frozen)
        with torch.set_grad_enabled(not frozen):
            hidden = final_hidden_states(self.target, input_ids)
        recipe = self.recipe
        teacher = None if self.teacher is None else self.teacher(hidden.detach())
        heads_loss = medusa_loss(
            self.heads, hidden.float(), labels, recipe.decay, recipe.chunk_size, counts, teacher, input_ids
        )
        if frozen:
            return {"loss": weights.heads * heads_loss, "heads_loss": heads_loss}
        target_loss = self._target_loss(input_ids, hidden, labels, counts)
        loss = weights.target * target_loss + weights.heads * heads_loss
        return {"loss": loss, "heads_loss": heads_loss, "target_loss": target_loss}

    def _target_loss(
        self,
        input_ids: torch.Tensor,  # [batch, length], int64
        hidden: torch.Tensor,  # [batch, length, hidden_size]
        labels: torch.Tensor,  # [batch, length], int64
        counts: LabelCounts | None,
    ) -> torch.Tensor:
        """Return L_LM, or the divergence from the original target, which is the target without its adapters."""
        if not self.recipe.distill:
            return lm_loss(self.logits, hidden, labels, self.recipe.chunk_size, counts)
        self.target.eval()
        with torch.no_grad(), self.target.disable_adapter():
            original = final_hidden_states(self.target, input_ids)
        self.target.train()
        return distillation_loss(self.logits, hidden, original, labels, self.recipe.chunk_size, counts)

    def _evaluate(
        self,
        input_ids: torch.Tensor,  # [batch, length], int64
        labels: torch.Tensor,  # [batch, length], int64
        weights: LossWeights,
    ) -> dict[str, torch.Tensor]:
        hidden = final_hidden_states(self.target, input_ids)
        heads = evaluate_batch(self.heads, hidden.float(), input_ids, labels, self.recipe)
        lm_losses, lm_positions = score_target(self.logits, hidden, labels)
        own = lm_losses.sum() / lm_positions.sum().clamp(min=1)
        loss = own + weights.heads * heads["loss"]
        return heads | {"loss": loss, "lm_losses": lm_losses, "lm_positions": lm_positions}


class Medusa2Trainer(MedusaTrainer):
    """Trains only the heads in the first stage, if there is one, and heads and target in the second."""

    recipe: Medusa2Recipe

    def parameter_groups(self, parameters: dict[str, nn.Parameter]) -> list[ParameterGroup]:
        """Give the target a lower learning rate than the heads (paper, section 2.2.2)."""
        heads = {name: parameter for name, parameter in parameters.items() if is_of_heads(name)}
        target = [parameter for name, parameter in parameters.items() if not is_of_heads(name)]
        rate = self.recipe.learning_rate
        return [
            *self.heads_groups(heads),
            ParameterGroup(target, rate / self.recipe.learning_rate_ratio, self.target_factor),
        ]

    def target_factor(self, step: int, total: int) -> float:
        return second_stage(step, self.recipe.heads_only_steps, self.recipe.warmup_steps, total)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Create the schedules; raises ``ValueError`` if the first stage takes all steps."""
        if self.recipe.heads_only_steps >= num_training_steps:
            raise ValueError(
                f"heads_only_steps must be less than {num_training_steps}, the steps of this run, "
                f"got {self.recipe.heads_only_steps}"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def loss_weights(self) -> LossWeights:
        """Return the current step's weights.

        In the first stage the target is frozen. In the second stage lambda_0 is constant or, as in the paper's
        reference code, ``heads_weight * sin(pi / 2 * progress)``, with progress from 0 to 1.
        """
        recipe, step = self.recipe, self.state.global_step
        if step < recipe.heads_only_steps:
            return LossWeights(target=0.0, heads=recipe.heads_weight)
        rise = 1.0
        if recipe.heads_weight_schedule == "sine":
            rise = sine_rise(step - recipe.heads_only_steps, self.state.max_steps - recipe.heads_only_steps)
        return LossWeights(target=1.0, heads=recipe.heads_weight * rise)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs | {"weights": self.loss_weights()}, *args, **kwargs)


def with_adapters(target: PreTrainedModel, recipe: Medusa2Recipe) -> nn.Module:
    """Add LoRA adapters to a target and freeze its own weights.

    Raises:
        ValueError: ``lora_targets`` names unknown layers or the LM head.

    """
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets) or "all-linear",
    )
    try:
        adapted = get_peft_model(target, settings)
    except ValueError as error:
        raise ValueError(f"lora_targets {list(recipe.lora_targets)}: {error}") from None
    if isinstance(target.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(f"lora_targets must not name the LM head, got {list(recipe.lora_targets)}")
    return adapted
