# SPDX-License-Identifier: Apache-2.0
"""The progress of a ``transformers.Trainer``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vllm_medusa.progress import progress


class TrainingProgress(TrainerCallback):
    """Shows steps with the last logged loss, and the tokens of all devices."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._open = ExitStack()
        self._loss: float | None = None
        self._tokens = 0

    def count(self, tokens: int) -> None:
        """Count the tokens of the step that begins."""
        self._tokens = tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown = self._open.enter_context(
            progress(self.title, state.max_steps, state.is_world_process_zero, state.global_step)
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        self._loss = logs.get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown.advance(tokens=self._tokens, loss=self._loss)

    def close(self) -> None:
        """End what is shown, also after an error in training."""
        self._open.close()
