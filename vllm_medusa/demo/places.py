# SPDX-License-Identifier: Apache-2.0
"""Where the demo finds what it decodes with, relative to the project's repository."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path("build/demo")
"""Where derived heads, logs and results are kept."""

MODEL = Path("build/smollm2")
HEADS = Path("examples/heads/smollm2-135m-instruct-sequential")
NATIVE_HEADS = Path("examples/heads/smollm2-135m-instruct")
"""Plain heads, the only ones that vLLM's own chain runs."""

QUESTIONS = Path("examples/questions.jsonl")


def native_heads_of(heads: Path, given: Path | None) -> Path:
    """Return the heads of vLLM's own chain: the given ones, else those beside the default heads, else the heads."""
    return given or (NATIVE_HEADS if heads == HEADS else heads)


def require_shipped(path: Path, option: str) -> None:
    """Raise ``ValueError`` if something is missing that the repository holds and the package does not."""
    if not path.exists():
        raise ValueError(
            f"{path} is not there: it is part of the project's repository, not of the installed package; run this in "
            f"the repository's root, or name another with {option}"
        )
