# SPDX-License-Identifier: Apache-2.0
"""The training loop of Medusa-1 and Medusa-2: a ``transformers.Trainer`` that saves only trained parameters."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from vllm_medusa.training.accuracy import HeldOut
from vllm_medusa.training.config import Recipe
from vllm_medusa.training.losses import LabelCounts, count_labels
from vllm_medusa.training.muon import Muon
from vllm_medusa.training.progress import TrainingProgress
from vllm_medusa.training.schedule import cosine_with_warmup
from vllm_medusa.training.write_errors import explain_write_errors

Blocks = Dataset[dict[str, torch.Tensor]] | Sequence[dict[str, torch.Tensor]]
"""Blocks of equal length, each ``{"input_ids": [length], "labels": [length]}``, int64."""

UNFINISHED = ".unfinished"
"""The directory in which a checkpoint is written before it is renamed; the rest of a killed run's is never read."""


def training_arguments(recipe: Recipe, output: Path, **options: Any) -> TrainingArguments:
    """Convert a recipe for ``transformers.Trainer``; by default nothing is saved, evaluated or reported."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "warmup_steps": recipe.warmup_steps,
        "seed": recipe.seed,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "logging_first_step": True,
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**(defaults | options))


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate, ``learning_rate * factor(step, number of all steps)``.

    ``orthogonal``: they are matrices that Muon updates.
    """

    parameters: list[nn.Parameter]
    learning_rate: float
    factor: Callable[[int, int], float]
    orthogonal: bool = False


class MedusaTrainer(Trainer):
    """Trains a module that holds a ``target`` and its ``heads``.

    Checkpoints hold the trained parameters, the optimizer, the schedule and the random state, but no frozen target.
    The module's ``forward(input_ids, labels, counts)`` returns a mapping with ``loss`` and, in training mode, further
    losses to log; in evaluation mode, the arguments of ``HeldOut.of`` in their order. A step's loss is the mean over
    all its labels, on all batches and devices (see ``LabelCounts``).
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        arguments: TrainingArguments,
        blocks: Blocks,
        held_out: Blocks,
        show_progress: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.recipe = recipe
        self._heads: Any = model.heads
        self._progress = TrainingProgress("Medusa heads, steps")
        self._checkpoint_root: Path | None = None
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=blocks,
            eval_dataset=held_out,
            compute_metrics=_metrics,
            callbacks=[*callbacks, *([self._progress] if show_progress else [])],
        )
        self.remove_callback(PrinterCallback)
        # The batches' losses are shares of the step's loss and add up; the base class would average them.
        self.model_accepts_loss_kwargs = True

    def fit(self, resume_from: Path | None = None) -> HeldOut:
        """Train, from a checkpoint if one is given, and evaluate; ``OSError`` if a checkpoint cannot be written."""
        try:
            self.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            self._progress.close()
        return HeldOut.of(*self.predict(self.eval_dataset).predictions)

    def parameter_groups(self, parameters: dict[str, nn.Parameter]) -> list[ParameterGroup]:
        """Group the trained parameters, given by name."""
        return self.heads_groups(parameters)

    def heads_groups(self, parameters: dict[str, nn.Parameter]) -> list[ParameterGroup]:
        """Group the heads' parameters: with Muon their layers' matrices, and the others."""
        muon = self.recipe.optimizer == "muon"
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in parameters.items():
            (matrices if muon and _is_layers_matrix(name, parameter) else others).append(parameter)
        rate, factor = self.recipe.learning_rate, self.heads_factor
        groups = ParameterGroup(others, rate, factor), ParameterGroup(matrices, rate, factor, orthogonal=True)
        return [group for group in groups if group.parameters]

    def heads_factor(self, step: int, total: int) -> float:
        return cosine_with_warmup(step, self.recipe.warmup_steps, total)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by their names in the module; all processes must call this."""
        trained = _trained_parameters(self.model)
        if not self.is_fsdp_enabled:
            return {name: parameter.detach() for name, parameter in trained.items()}
        whole = self.accelerator.get_state_dict(self.model)
        return {name: tensor for name, tensor in whole.items() if name in trained}

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if self.recipe.optimizer == "muon" and self.is_fsdp_enabled:
                raise ValueError(
                    "optimizer must be 'adamw' under FSDP, got 'muon': it needs whole matrices, and FSDP divides them"
                )
            self._groups = self.parameter_groups(_trained_parameters(self.model if model is None else model))
            settings = [
                {"params": group.parameters, "lr": group.learning_rate, "orthogonal": group.orthogonal}
                for group in self._groups
            ]
            kind = Muon if self.recipe.optimizer == "muon" else AdamW
            self.optimizer = kind(settings, weight_decay=self.recipe.weight_decay, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        def at_each_step(factor: Callable[[int, int], float]) -> Callable[[int], float]:
            return lambda step: factor(step, num_training_steps)

        if self.lr_scheduler is None:
            scheduled = self.create_optimizer() if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(scheduled, [at_each_step(group.factor) for group in self._groups])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], LabelCounts]:
        """Return this device's batches of a step, and the step's label counts.

        The counts are those of all devices divided by the number of devices, since devices' gradients are averaged.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._progress.count(sum(batch["input_ids"].numel() for batch in batches) * self.args.world_size)
        counted = torch.zeros(1 + self.recipe.num_heads, device=device)
        for batch in batches:
            counted += count_labels(batch["labels"].to(device), self._heads)
        return batches, LabelCounts.of(self.accelerator.reduce(counted, reduction="mean") / max(1, self.args.n_gpu))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: LabelCounts | None = None,
    ) -> Any:
        """Return the loss and keep its parts for ``log``."""
        if not model.training:
            outputs = model(**inputs)
        else:
            outputs = model(**inputs, counts=num_items_in_batch)
            for name, value in outputs.items():
                if name != "loss":
                    self._parts[name].append(value.detach() * self.current_gradient_accumulation_steps)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also the means of the loss's parts; all processes call this."""
        if "loss" in logs:
            means = {name: torch.stack(values).mean() for name, values in self._parts.items()}
            logs = logs | {name: float(self.accelerator.reduce(mean, "mean")) for name, mean in means.items()}
            self._parts.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        trained = _trained_parameters(self.model)
        state = trained if state_dict is None else {name: state_dict[name] for name in trained}
        super()._save(output_dir, {name: tensor.detach().contiguous() for name, tensor in state.items()})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint of other parameters; the frozen target's are missing from every checkpoint."""
        wrong = sorted(
            _trained_parameters(self.model).keys() & load_result.missing_keys | {*load_result.unexpected_keys}
        )
        if wrong:
            raise ValueError(f"the checkpoint does not fit the model: only one of them has {wrong[0]}")

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._checkpoint_root is None else str(self._checkpoint_root)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint in another directory and rename it, so that every named checkpoint is complete."""
        root = Path(self.args.output_dir)
        self._checkpoint_root = root / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(self._checkpoint_root, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with explain_write_errors(root):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                    (self._checkpoint_root / name).rename(root / name)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._checkpoint_root, ignore_errors=True)
            self._checkpoint_root = None
        if self.args.should_save:
            rotate_checkpoints(str(root), self.args.save_total_limit)


def is_of_heads(name: str) -> bool:
    return name.startswith("heads.")


def _is_layers_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell the matrices of the heads' layers from biases and from LM heads, whose rows are tokens."""
    return parameter.ndim == 2 and ".lm_heads." not in name


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, without the prefixes that FSDP adds."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    return HeldOut.of(*prediction.predictions).metrics()
