# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal; elsewhere, as in logs, a line at least every half minute."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 30.0

Item = TypeVar("Item")


class Progress:
    """Counts steps and tokens, and tells what is left.

    Args:
        title: what is done.
        total: number of steps; None if unknown.
        done: steps that an earlier run has done.
        clock: returns seconds.

    """

    def __init__(
        self, title: str, total: int | None = None, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.tokens = 0
        self._advanced = 0
        self._loss = math.nan
        self._clock = clock
        self._start = clock()
        self._changed: Callable[[], None] = lambda: None

    def advance(self, steps: int = 1, tokens: int = 0, loss: float | None = None) -> None:
        """Count work that is done, with the loss of its last step; losses are smoothed."""
        self.done += steps
        self._advanced += steps
        self.tokens += tokens
        if loss is not None:
            self._loss = loss if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        self._changed()

    def skip_to(self, done: int) -> None:
        """Count steps that need no work, such as those of an earlier run; they say nothing about what is left."""
        self.done = done
        self._changed()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining steps take at the speed since the start; None if unknown."""
        if self.total is None or self._advanced == 0:
            return None
        return max(0, self.total - self.done) * self.elapsed / self._advanced

    @property
    def details(self) -> str:
        """The loss and the tokens per second, as far as there are any."""
        parts = [] if math.isnan(self._loss) else [f"loss {self._loss:.3f}"]
        if self.tokens and self.elapsed > 0:
            parts.append(f"{self.tokens / self.elapsed:.0f} tokens/s")
        return ", ".join(parts)

    def line(self, ended: bool = False) -> str:
        """Describe the state in one line: with the time left, or with the time that it took."""
        steps = "" if self.total is None else f"{self.done} of {self.total}"
        left = self.seconds_left
        rest = f"{_duration(left)} left" if left is not None and not ended else f"after {_duration(self.elapsed)}"
        return f"{self.title}: " + ", ".join(filter(None, (steps, self.details, rest)))


@contextmanager
def progress(title: str, total: int | None = None, visible: bool = True, done: int = 0) -> Iterator[Progress]:
    """Show the progress of the work in this context on standard error."""
    shown = Progress(title, total, done)
    console = Console(stderr=True)
    if not visible:
        yield shown
    elif console.is_terminal:
        with _bar(shown, console):
            yield shown
    else:
        with lines(shown, sys.stderr):
            yield shown


def track(items: Sequence[Item], title: str, visible: bool = True) -> Iterator[Item]:
    """Yield items and show how many are done."""
    with progress(title, len(items), visible) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def lines(
    shown: Progress, stream: TextIO, seconds: float = SECONDS_BETWEEN_LINES, stop: threading.Event | None = None
) -> Iterator[None]:
    """Print a line every ``seconds``, and one at the end of the work if it ends without an error.

    Args:
        shown: the progress.
        stream: where lines are printed.
        seconds: between two lines.
        stop: ends the lines when it is set; its ``wait`` measures the time.

    """
    ended = stop or threading.Event()

    def print_lines() -> None:
        while not ended.wait(seconds):
            print(shown.line(), file=stream, flush=True)

    # A thread, because one step, such as a model's download, may take longer than that.
    printer = threading.Thread(target=print_lines, name="progress", daemon=True)
    printer.start()
    try:
        yield
    finally:
        ended.set()
        printer.join()
    print(shown.line(ended=True), file=stream, flush=True)


@contextmanager
def _bar(shown: Progress, console: Console) -> Iterator[None]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[details]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(shown.title, total=shown.total, completed=shown.done, details="")
        shown._changed = lambda: bar.update(task, completed=shown.done, details=shown.details)
        yield


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
