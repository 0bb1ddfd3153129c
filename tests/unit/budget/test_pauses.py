# SPDX-License-Identifier: Apache-2.0
"""Heads whose drafts are not worth verifying are asked ever more seldom, and at once where the load falls."""

from __future__ import annotations

import pytest

from vllm_medusa.budget.pauses import FIRST_PAUSE, LONGEST_PAUSE, PATIENCE, Gains, Pauses


def asked(pauses: Pauses, steps: int, num_reqs: int, *, verified: bool) -> list[int]:
    """In which steps heads are asked; what they say is verified in the next step, or not."""
    found = []
    for step in range(steps):
        if found and found[-1] == step - 1:
            pauses.saw(num_reqs, verified=verified)
        if pauses.asks_heads(num_reqs):
            found.append(step)
    return found


def test_heads_that_are_verified_are_always_asked() -> None:
    assert asked(Pauses(), 100, 4, verified=True) == list(range(100))


def test_pauses_double_up_to_the_longest() -> None:
    steps = asked(Pauses(), 2000, 16, verified=False)
    assert steps[:PATIENCE] == list(range(PATIENCE))
    between = [later - earlier - 1 for earlier, later in zip(steps[PATIENCE - 1 :], steps[PATIENCE:], strict=False)]
    assert between[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert set(between[3:]) == {LONGEST_PAUSE}


def test_a_pause_is_of_its_load_and_goes_on_when_that_comes_again() -> None:
    pauses = Pauses()
    for _ in range(PATIENCE):
        pauses.saw(16, verified=False)
    assert [pauses.asks_heads(num_reqs) for num_reqs in (16, 31, 8, 15, 8)] == [False, False, True, True, True]
    pauses.saw(8, verified=True)
    assert [pauses.asks_heads(16) for _ in range(FIRST_PAUSE - 1)] == [False] * (FIRST_PAUSE - 2) + [True]
    pauses.saw(16, verified=False)
    assert [pauses.asks_heads(16) for _ in range(2 * FIRST_PAUSE)] == [False] * 2 * FIRST_PAUSE


def test_one_verified_draft_ends_all_patience_lost() -> None:
    pauses = Pauses()
    for _ in range(PATIENCE - 1):
        pauses.saw(4, verified=False)
    pauses.saw(4, verified=True)
    pauses.saw(4, verified=False)
    assert pauses.asks_heads(4)


def test_speculation_ends_where_it_is_slower_on_average_and_begins_again_where_it_is_clearly_faster() -> None:
    gains = Gains()
    assert [gains.pays(1, gain, 1.0) for gain in (0.85, 1.9) * 20] == [True] * 40
    assert not [gains.pays(64, 0.9, 1.0) for _ in range(3)][-1]
    assert not [gains.pays(64, 1.01, 1.0) for _ in range(60)][-1]
    assert [gains.pays(64, 1.2, 1.0) for _ in range(20)][-1]
    assert gains.pays(1, 1.0, 1.0)


def test_a_gain_is_all_tokens_by_all_time() -> None:
    """Not the average of each step's gain: steps that take long count as long as they take."""
    gains = Gains()
    for step in range(400):
        gains.pays(64, *((1.2, 1.0) if step % 2 else (6.0, 4.0)))
    assert gains.of(64) == pytest.approx((1.2 + 6.0) / (1.0 + 4.0), rel=0.15)
