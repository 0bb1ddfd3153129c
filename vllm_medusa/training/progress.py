"""One progress bar for everything that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ReportStep(Protocol):
    """Tells the progress bar that a step is done."""

    def __call__(self, loss: float) -> None:
        """Advance by one step and show its loss."""


@contextmanager
def training_progress(title: str, steps: int, visible: bool = True) -> Iterator[ReportStep]:
    """Show a progress bar with a smoothed loss while a training loop runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not visible) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        smoothed: float | None = None

        def report(loss: float) -> None:
            nonlocal smoothed
            smoothed = loss if smoothed is None else 0.95 * smoothed + 0.05 * loss
            progress.update(task, advance=1, loss=smoothed)

        yield report
