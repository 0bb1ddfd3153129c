# SPDX-License-Identifier: Apache-2.0
"""What to do where a write of a training run fails."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from vllm_medusa.files import named_write_errors

ADVICE = "make room there and give the same command again, which resumes from the last complete checkpoint"


def explain_write_errors(directory: Path) -> AbstractContextManager[None]:
    """Raise ``WriteError`` of the run's directory where a write in this context fails."""
    return named_write_errors(directory, ADVICE)
