# SPDX-License-Identifier: Apache-2.0
"""Questions in Spec-Bench's format, and how they are put to a chat model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_medusa.data.record_files import BadLineError
from vllm_medusa.demo.questions import read_questions

QUESTIONS = Path(__file__).parents[3] / "examples" / "questions.jsonl"


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_limit_is_of_each_category_and_further_fields_are_ignored(tmp_path: Path) -> None:
    lines = [
        {"question_id": number, "category": category, "turns": ["why?", "how?"], "reference": ["because"]}
        for number, category in enumerate(["qa", "math", "qa", "qa", "math"])
    ]
    found = read_questions(write(tmp_path / "questions.jsonl", *lines), 2)
    assert [(each.question_id, each.category) for each in found] == [(0, "qa"), (2, "qa"), (1, "math"), (4, "math")]
    assert found[0].turns == ("why?", "how?")


@pytest.mark.parametrize("line", [{"question_id": 1, "category": "qa", "turns": []}, {"turns": ["why?"]}, []])
def test_a_line_without_a_question_is_refused_by_its_number(tmp_path: Path, line: object) -> None:
    file = write(tmp_path / "questions.jsonl", {"question_id": 1, "category": "qa", "turns": ["why?"]}, line)
    with pytest.raises(BadLineError, match=r"questions.jsonl:2: "):
        read_questions(file, None)


def test_a_file_without_a_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"questions\.jsonl holds no question"):
        read_questions(write(tmp_path / "questions.jsonl"))


def test_the_repository_s_questions_are_four_of_six_kinds() -> None:
    found = read_questions(QUESTIONS, None)
    kinds = [each.category for each in found]
    assert len({each.question_id for each in found}) == 24
    assert {kinds.count(kind) for kind in kinds} == {4}
    assert len(set(kinds)) == 6
