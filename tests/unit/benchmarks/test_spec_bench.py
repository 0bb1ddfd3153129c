# SPDX-License-Identifier: Apache-2.0
"""Questions in Spec-Bench's format become batches of one category, and answers become figures against plain ones."""

from __future__ import annotations

import pytest

from dialogues import Answers, batches
from spec_bench import summarise
from vllm_medusa.demo.questions import Question


def question(number: int, category: str, turns: int = 1) -> Question:
    return Question(question_id=number, category=category, turns=("why?",) * turns)


def test_a_batch_has_one_category() -> None:
    questions = [question(1, "qa"), question(2, "qa"), question(3, "qa"), question(4, "math")]
    found = [[each.question_id for each in batch.questions] for batch in batches(questions, 2, 8)]
    assert found == [[1, 2], [3], [4]]


def test_figures_are_of_totals_and_texts_are_those_of_whole_questions() -> None:
    plain = [
        ("qa", Answers([[[1, 2], [3, 4]], [[5, 6]]], seconds=6.0, steps=3, accepted=0)),
        ("math", Answers([[[7, 8, 9, 9]]], seconds=2.0, steps=3, accepted=0)),
    ]
    tree = [
        ("qa", Answers([[[1, 2], [3, 5]], [[5, 6]]], seconds=3.0, steps=2, accepted=3)),
        ("math", Answers([[[7, 8, 9, 9]]], seconds=2.0, steps=2, accepted=1)),
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
