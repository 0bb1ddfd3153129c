# SPDX-License-Identifier: Apache-2.0
"""How commands report errors, and an interrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from safetensors import SafetensorError

INTERRUPTED = "Interrupted: nothing half-written is left; the same command again goes on from what is complete"

INTERRUPTED_STATUS = 128 + signal.SIGINT
"""The status that a shell gives a command that an interrupt has ended."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors in settings and files in one line without a traceback, and exit with 2; after Ctrl-C with 130."""
    with _interrupts() as interrupts:
        try:
            yield
        except BaseException as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                typer.echo(INTERRUPTED, err=True)
                raise typer.Exit(INTERRUPTED_STATUS) from None
            if isinstance(error, ValueError | OSError | SafetensorError):
                typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
                raise typer.Exit(2) from None
            raise


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Yield the interrupts so far: libraries turn the ``KeyboardInterrupt`` that they meet into errors of their own."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
