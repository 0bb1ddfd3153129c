# SPDX-License-Identifier: Apache-2.0
"""The progress bar of self-distillation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from vllm_medusa.distillation.dialogue import Answer, Dialogue
    from vllm_medusa.distillation.raw_text import WrittenText


class TokenRateColumn(TextColumn):
    """Emitted tokens per second since the start; empty before the first answer."""

    def render(self, task: Task) -> Text:
        tokens, elapsed = task.fields["tokens"], task.elapsed
        return Text(f"{tokens / elapsed:.0f} tokens/s" if tokens and elapsed else "")


class GenerationProgress:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._tokens = 0

    def answered(self, dialogue: Dialogue, answer: Answer) -> None:
        """Count an answer's tokens, and the dialogue if it has ended."""
        self._tokens += answer.num_tokens
        self._progress.update(self._task, advance=0 if dialogue.is_open else 1, tokens=self._tokens)

    def wrote(self, text: WrittenText) -> None:
        """Count the tokens of a text outside of dialogues."""
        self._tokens += text.num_tokens
        self._progress.update(self._task, tokens=self._tokens)

    def reach(self, prompts: int) -> None:
        """Show the first ``prompts`` prompts as done; an earlier run may have done them."""
        self._progress.update(self._task, completed=prompts)


@contextmanager
def generation_progress(title: str, prompts: int, visible: bool = True) -> Iterator[GenerationProgress]:
    """Show a progress bar of answered prompts with tokens per second."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TokenRateColumn(""),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not visible) as progress:
        yield GenerationProgress(progress, progress.add_task(title, total=prompts, tokens=0))
