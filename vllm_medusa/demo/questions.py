# SPDX-License-Identifier: Apache-2.0
"""Questions in Spec-Bench's format, a JSON object a line: ``{"question_id", "category", "turns": [...]}``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vllm_medusa.data.record_files import BadLineCounter, BadLines, parsed_lines
from vllm_medusa.data.records import FrozenModel, as_object
from vllm_medusa.data.validation import validated


class Question(FrozenModel):
    """A question of Spec-Bench: what a user says, turn by turn."""

    question_id: int | str
    category: str
    turns: Annotated[tuple[str, ...], Field(min_length=1)]


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """Return the first ``limit`` questions of each category, category by category.

    Raises:
        ValueError: a line holds no question, or the file none at all.
        OSError: the file cannot be read.

    """
    by_category: dict[str, list[Question]] = defaultdict(list)
    parsed = parsed_lines([file], lambda value: validated(Question, as_object(value)), BadLineCounter(BadLines.REFUSE))
    for _, question in parsed:
        by_category[question.category].append(question)
    if not by_category:
        raise ValueError(f"{file} holds no question")
    return [question for questions in by_category.values() for question in questions[:limit]]
