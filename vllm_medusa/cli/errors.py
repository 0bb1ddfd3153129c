# SPDX-License-Identifier: Apache-2.0
"""How commands report errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from safetensors import SafetensorError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors in settings and files in one line without a traceback, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
