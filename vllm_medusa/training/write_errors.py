"""Errors of the disk, which the libraries that write weights report each in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""What ``torch.save`` names in the ``RuntimeError`` that it raises when a file cannot be written to its end."""


@contextmanager
def explain_write_errors(directory: Path) -> Iterator[None]:
    """Raise whatever goes wrong with the disk in this context as one ``OSError`` that names the directory."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        raise OSError(
            f"cannot write to {directory}: {error}; make room there and give the same command again, "
            "which goes on from the last whole checkpoint"
        ) from None
