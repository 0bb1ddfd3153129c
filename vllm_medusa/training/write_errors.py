# SPDX-License-Identifier: Apache-2.0
"""Turn the errors of failed writes, which differ between libraries, into ``OSError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_medusa.files import WriteError

TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""Names in the ``RuntimeError`` that ``torch.save`` raises if a write fails."""


@contextmanager
def explain_write_errors(directory: Path) -> Iterator[None]:
    """Raise an ``OSError`` that names the directory if a write in this context fails."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        reason = error.reason if isinstance(error, WriteError) else error
        raise OSError(
            f"cannot write to {directory}: {reason}; make room there and give the same command again, "
            "which resumes from the last complete checkpoint"
        ) from None
