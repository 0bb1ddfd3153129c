# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run: names, defaults, bounds and descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_medusa.data.record_files import BadLines
from vllm_medusa.data.validation import validated

HeadsLoss = Literal["cross_entropy", "kl"]


class Recipe(BaseModel):
    """The settings that all ways of training heads share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_heads: int = Field(
        default=4, ge=1, description="Heads to train: head k predicts the token k after the next one."
    )
    num_layers: int = Field(default=1, ge=1, description="Residual layers per head.")
    path_rank: int | None = Field(
        default=None,
        ge=1,
        description="Train sequentially dependent heads, which read the path to a node through layers of this rank. "
        "Default: plain Medusa heads.",
    )
    shared_lm_head: bool = Field(
        default=False, description="Let all heads use the target's LM head; train the layers only."
    )
    decay: float = Field(default=0.8, gt=0, le=1, description="The loss weight of head k is decay^k.")
    batch_size: int = Field(default=8, ge=1, description="Blocks per step and device.")
    learning_rate: float = Field(default=1e-3, gt=0, description="The heads' highest learning rate, after the warm-up.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps of the learning rates' linear warm-up.")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="Of the matrices in the heads' layers; AdamW updates all else."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="The optimizer's weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    ranks: int = Field(
        default=10, ge=1, description="How many of a head's most probable tokens the held-out accuracies cover."
    )
    chunk_size: int = Field(default=4096, ge=1, description="Predictions whose logits are in memory at once.")
    seed: int = Field(default=0, ge=0, description="Random seed of data order, LoRA weights and dropout.")


class Medusa1Config(Recipe):
    """The settings of ``train_medusa1``, which trains in memory and writes nothing."""

    steps: int = Field(default=200, ge=1, description="Optimizer steps.")
    prompt_length: int = Field(default=0, ge=0, description="Tokens at each block's start on which no loss is taken.")

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must be at most {self.steps} (steps), got {self.warmup_steps}")
        return self


class Medusa2Recipe(Recipe):
    """The settings of joint training (paper, sections 2.2.2 and 2.3.2)."""

    target_training: Literal["lora", "full"] = Field(
        default="lora", description="Train LoRA adapters of the target, or all its weights."
    )
    lora_rank: int = Field(default=32, ge=1, description="Rank of the LoRA adapters.")
    lora_alpha: float = Field(default=16.0, gt=0, description="LoRA's scale: adapters are scaled by alpha / rank.")
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout in front of the LoRA adapters.")
    lora_targets: tuple[str, ...] = Field(
        default=(), description="Names of the layers with adapters. Default: all linear layers."
    )
    learning_rate_ratio: float = Field(
        default=4.0, gt=0, description="The heads' learning rate divided by the target's."
    )
    heads_weight: float = Field(
        default=0.2, gt=0, description="lambda_0, the weight of the heads' loss in the joint loss."
    )
    heads_weight_schedule: Literal["sine", "constant"] = Field(
        default="sine", description="Raise lambda_0 from 0 as a sine, or keep it constant."
    )
    heads_only_steps: int = Field(default=0, ge=0, description="Steps of the first stage, which trains only the heads.")
    distill: bool = Field(default=False, description="Replace the LM loss by KL(original target || trained target).")

    @model_validator(mode="after")
    def _teacher_exists(self) -> Self:
        if self.distill and self.target_training == "full":
            raise ValueError(
                "distill must be false with target_training 'full', got true: the teacher is the target with its "
                "adapters switched off; use target_training 'lora'"
            )
        return self


class TrainConfig(Medusa2Recipe):
    """The settings of ``vllm-medusa train``.

    With ``heads_loss`` "kl" the target's 64 most probable tokens are learnt one by one; all others are the tail, a
    single outcome (see ``medusa_loss``).
    """

    method: Literal["medusa1", "medusa2"] = Field(
        default="medusa1", description="Train only the heads, or heads and target together."
    )
    target: str = Field(description="The target: a directory, or a repository on the Hugging Face Hub.")
    data: tuple[Path, ...] = Field(min_length=1, description="Files of conversations, prompts or texts.")
    held_out: tuple[Path, ...] = Field(
        default=(), description="Files to evaluate the heads on. Default: a share of the data."
    )
    held_out_share: float = Field(
        default=0.02, gt=0, lt=1, description="The share of blocks to evaluate on, if held_out is not given."
    )
    skip_bad: bool = Field(
        default=False, description="Skip and count lines without a valid record instead of refusing them."
    )
    labels: Literal["answers", "all"] = Field(
        default="answers", description="Learn what the target answers, or all tokens of the data, prompts included."
    )
    block_length: int = Field(default=2048, ge=8, description="Tokens per block.")
    output: Path = Field(description="The directory for the heads, the results and the checkpoints.")
    initial_heads: Path | None = Field(
        default=None,
        description="Go on with these heads, whose sizes the run must have. Default: new ones, which predict what the "
        "target predicts.",
    )

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; overrides epochs.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the data.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches per optimizer step.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="The dtype of the target's weights."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="Autocast during training.")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="Load the target through bitsandbytes."
    )
    cache_hidden: bool = Field(
        default=False,
        description="Compute the frozen target's hidden states once and keep them on disk, in bf16; medusa1 only.",
    )
    cache_directory: Path | None = Field(
        default=None, description="Where hidden states are kept. Default: the output's hidden_states."
    )
    draft_vocab: int | None = Field(
        default=None,
        ge=1,
        description="Train heads that can draft only the N most frequent tokens of the training text. Default: all.",
    )
    heads_loss: HeadsLoss = Field(
        default="cross_entropy",
        description="Learn from the text's tokens, or from the target's distribution: its 64 most probable tokens, "
        "with all others as one outcome.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute the target's layers in the backward pass to save memory."
    )
    trust_remote_code: bool = Field(default=False, description="Run the code in the target's repository.")

    save_steps: int = Field(default=500, ge=1, description="Steps between two checkpoints.")
    save_limit: int = Field(default=2, ge=1, description="Checkpoints to keep; older ones are deleted.")
    resume: Literal["auto", "never"] = Field(
        default="auto", description="Resume from the last checkpoint, or delete the checkpoints and start anew."
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between two evaluations. Default: evaluate only at the end."
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between two log entries.")
    report_to: tuple[str, ...] = Field(
        default=(), description="Where losses are logged: tensorboard, wandb, mlflow, ..."
    )

    @property
    def bad_lines(self) -> BadLines:
        return BadLines.from_flag(self.skip_bad)

    @model_validator(mode="after")
    def _combinations_exist(self) -> Self:
        if self.method == "medusa1":
            for name, field in Medusa2Recipe.model_fields.items():
                if name not in Recipe.model_fields and getattr(self, name) != field.default:
                    raise ValueError(
                        f"{name} is a setting of method 'medusa2', got {getattr(self, name)!r} with 'medusa1'"
                    )
        if self.cache_hidden and self.method == "medusa2":
            raise ValueError(
                "cache_hidden must be false with method 'medusa2', got true: the target is trained, so that its hidden "
                "states change; use method 'medusa1'"
            )
        if self.cache_directory is not None and not self.cache_hidden:
            raise ValueError(
                f"cache_directory is a setting of cache_hidden, got {str(self.cache_directory)!r} without it; "
                "set cache_hidden, or leave cache_directory out"
            )
        if self.path_rank is not None and self.method == "medusa2" and self.target_training == "full":
            raise ValueError(
                f"path_rank is not for target_training 'full', got {self.path_rank}: the heads read the target's input "
                "embedding, which would change; use target_training 'lora'"
            )
        if self.quantization != "none" and self.method == "medusa2" and self.target_training == "full":
            raise ValueError(
                f"quantization must be 'none' with target_training 'full', got {self.quantization!r}: quantized "
                "weights cannot be trained; use target_training 'lora'"
            )
        if self.block_length < self.num_heads + 2:
            raise ValueError(
                f"block_length must be at least {self.num_heads + 2} for {self.num_heads} heads (num_heads), "
                f"got {self.block_length}: head {self.num_heads} predicts {self.num_heads + 1} tokens ahead"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must be at most {self.steps} (steps), got {self.warmup_steps}")
        return self


def load_config(file: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Read settings.

    Args:
        file: a YAML mapping of names to values, or None.
        overrides: settings that take precedence over the file's.

    Raises:
        OSError: the file cannot be read.
        ValueError: a name or value is wrong; the message is one line and says what is allowed.

    """
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold a mapping of names to values, got {type(content).__name__}")
        settings.update(content)
    settings.update(overrides)
    return validated(TrainConfig, settings)
