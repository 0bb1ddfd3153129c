# SPDX-License-Identifier: Apache-2.0
"""Questions in Spec-Bench's format become batches of one category, and answers become figures against plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec_bench import Answers, Question, batches, read_questions, summarise
from vllm_medusa.data.record_files import BadLineError

QUESTIONS = Path(__file__).parents[3] / "examples" / "questions.jsonl"


def question(number: int, category: str, turns: int = 1) -> Question:
    return Question(question_id=number, category=category, turns=("why?",) * turns)


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


def test_the_repository_s_questions_are_four_of_six_kinds() -> None:
    found = read_questions(QUESTIONS, None)
    kinds = [each.category for each in found]
    assert len({each.question_id for each in found}) == 24
    assert {kinds.count(kind) for kind in kinds} == {4}
    assert len(set(kinds)) == 6


def test_a_batch_has_one_category() -> None:
    questions = [question(1, "qa"), question(2, "qa"), question(3, "qa"), question(4, "math")]
    found = [[each.question_id for each in batch.questions] for batch in batches(questions, 2, 8)]
    assert found == [[1, 2], [3], [4]]


def test_figures_are_of_totals_and_texts_are_those_of_whole_questions() -> None:
    plain = [
        ("qa", Answers([[[1, 2], [3, 4]], [[5, 6]]], seconds=6.0, drafts=0, accepted=0)),
        ("math", Answers([[[7, 8, 9, 9]]], seconds=2.0, drafts=0, accepted=0)),
    ]
    tree = [
        ("qa", Answers([[[1, 2], [3, 5]], [[5, 6]]], seconds=3.0, drafts=2, accepted=3)),
        ("math", Answers([[[7, 8, 9, 9]]], seconds=2.0, drafts=2, accepted=1)),
    ]
    found = summarise({"plain": plain, "tree": tree})
    assert found["plain"]["tokens_per_step"] == found["plain"]["speedup"] == found["plain"]["identical_texts"] == 1
    assert found["tree"]["tokens_per_step"] == 2
    assert found["tree"]["tokens_per_second"] == 2
    assert found["tree"]["speedup"] == pytest.approx(8 / 5)
    assert found["tree"]["identical_texts"] == pytest.approx(2 / 3)
    assert found["tree"]["by_category"]["qa"]["speedup"] == 2
    assert found["tree"]["by_category"]["qa"]["identical_texts"] == 0.5
    assert found["tree"]["by_category"]["math"]["tokens_per_step"] == 1.5
