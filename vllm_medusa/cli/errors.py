"""What a command prints when it cannot do what it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from safetensors import SafetensorError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a wrong setting, file or disk as one line, without a traceback, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
