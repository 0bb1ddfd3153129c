# SPDX-License-Identifier: Apache-2.0
"""Where the demo finds what it decodes with, relative to the project's repository."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path("build/demo")
"""Where derived heads, logs and results are kept."""

MODEL = Path("build/smollm2")
HEADS = Path("examples/heads/smollm2-135m-instruct")
QUESTIONS = Path("examples/questions.jsonl")


def require_shipped(path: Path, option: str) -> None:
    """Raise ``ValueError`` if something is missing that the repository holds and the package does not."""
    if not path.exists():
        raise ValueError(
            f"{path} is not there: it is part of the project's repository, not of the installed package; run this in "
            f"the repository's root, or name another with {option}"
        )
