# SPDX-License-Identifier: Apache-2.0
"""A budget counts what it let through, and what came of it by what it expected."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.budget.test_budget import DEAR, FREE, all_emit, budget, drafts, feed
from vllm_medusa.budget.budget import Budget
from vllm_medusa.budget.tally import BINS, Tally


def test_a_budget_counts_its_steps_and_nodes() -> None:
    counting = Budget(2, most=4)
    assert not counting.asks_heads(0)
    assert counting.asks_heads(2)
    counting.cut(["a", "b"], drafts([0.9, 0.8, 0.7], [0.6, 0.3, 0.2]), all_emit(2))
    tally = counting.tally
    assert (tally.steps, tally.asked, tally.requests, tally.drafted, tally.chosen) == (1, 1, 2, 6, 4)


def test_steps_in_which_heads_pause_are_not_among_those_that_asked_them() -> None:
    counting = budget(DEAR)
    for _ in range(20):
        if counting.asks_heads(1):
            counting.cut(["a"], drafts([0.9, 0.8, 0.1]), all_emit(1))
        feed(counting, ["a"], 0, accepted=0)
    assert counting.tally.steps == counting.tally.requests == 20
    assert 0 < counting.tally.asked < 10
    assert counting.tally.chosen == 0


def test_what_was_accepted_is_counted_by_what_the_budget_expected() -> None:
    counting = budget(FREE)
    counting.cut(["a"], drafts([0.92, 0.55, 0.13]), all_emit(1))
    feed(counting, ["a"], 3, accepted=1)
    tally = counting.tally
    assert np.flatnonzero(tally.nodes).tolist() == [1, 5, 9]
    assert tally.expected[[1, 5, 9]].tolist() == pytest.approx([0.13, 0.55, 0.92])
    assert tally.accepted.tolist() == [0] * 9 + [1]


def test_certain_nodes_are_in_the_last_tenth() -> None:
    tally = Tally()
    tally.verified(np.array([1.0, 0.0], dtype=np.float32), np.array([True, False]))
    assert np.flatnonzero(tally.nodes).tolist() == [0, BINS - 1]


def test_what_is_taken_is_counted_once() -> None:
    tally = Tally()
    tally.began(3)
    tally.verified(np.array([0.5], dtype=np.float32), np.array([True]))
    taken = tally.take()
    assert (taken.steps, taken.requests, int(taken.accepted.sum())) == (1, 3, 1)
    assert (tally.steps, tally.requests, int(tally.accepted.sum()), int(tally.nodes.sum())) == (0, 0, 0, 0)
