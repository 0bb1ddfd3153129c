# SPDX-License-Identifier: Apache-2.0
"""The progress bar of training loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@contextmanager
def training_progress(title: str, steps: int, visible: bool = True, done: int = 0) -> Iterator[Callable[[float], None]]:
    """Show a progress bar that starts at step ``done``; call the yielded function with each step's loss."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not visible) as progress:
        task = progress.add_task(title, total=steps, completed=done, loss=float("nan"))
        smoothed = float("nan")

        def report(loss: float) -> None:
            nonlocal smoothed
            smoothed = loss if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * loss
            progress.update(task, advance=1, loss=smoothed)

        yield report


class ProgressBar(TrainerCallback):
    """The progress bar of a ``transformers.Trainer``, with the last logged loss."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._open = ExitStack()
        self._loss = float("nan")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report = self._open.enter_context(
            training_progress(self.title, state.max_steps, state.is_world_process_zero, state.global_step)
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        self._loss = logs.get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(self._loss)

    def close(self) -> None:
        """Remove the bar, also after an error in training."""
        self._open.close()
