# SPDX-License-Identifier: Apache-2.0
"""The most probable nodes of a batch are verified, as many as give the most tokens in a second over many steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.budget.choice import Choice, choose, count_most_probable

CURVES: dict[str, Callable[[int], float]] = {
    "flat to 64 rows, then linear": lambda rows: 1 + max(rows - 64, 0) / 16,
    "stepped": lambda rows: 1 + (rows - 1) // 4,
    "linear": lambda rows: 1 + 0.2 * rows,
    "steep": lambda rows: float(rows),
    "flat": lambda rows: 1.0,
}


@st.composite
def batches(draw: st.DrawFn, most_requests: int = 4, most_nodes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    num_reqs, num_nodes = draw(st.integers(1, most_requests)), draw(st.integers(1, most_nodes))
    probability = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)
    rows = [sorted(draw(st.lists(probability, min_size=num_nodes, max_size=num_nodes)))[::-1] for _ in range(num_reqs)]
    lengths = draw(st.lists(st.integers(0, num_nodes), min_size=num_reqs, max_size=num_reqs))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(lengths)


def settled(steps: list[tuple[torch.Tensor, torch.Tensor]], cost: Callable[[int], float]) -> tuple[list[Choice], float]:
    """Choose for steps that come again and again, by their own average rate; return that too."""
    rate = 0.0
    while True:
        choices = [
            choose(probabilities, lengths, len(lengths), seconds_of(lengths, cost), rate)
            for probabilities, lengths in steps
        ]
        before, rate = rate, sum(each.tokens for each in choices) / sum(each.seconds for each in choices)
        if rate <= before * (1 + 1e-9):
            return choices, rate


def seconds_of(lengths: torch.Tensor, cost: Callable[[int], float]) -> torch.Tensor:
    num_reqs = len(lengths)
    return torch.tensor([cost(num_reqs + nodes) for nodes in range(int(lengths.sum()) + 1)], dtype=torch.float64)


def every_cut(
    probabilities: torch.Tensor, lengths: torch.Tensor, cost: Callable[[int], float]
) -> list[tuple[float, float]]:
    """Return what a step emits and takes with each cut of its drafts."""
    return [
        (
            len(cut) + sum(float(row[:length].sum()) for row, length in zip(probabilities, cut, strict=True)),
            cost(len(cut) + sum(cut)),
        )
        for cut in product(*(range(length + 1) for length in lengths.tolist()))
    ]


@pytest.mark.parametrize("name", CURVES)
@deterministic
@given(batches())
def test_where_all_steps_are_alike_no_other_cut_gives_more_tokens_in_a_second(
    name: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    probabilities, lengths = batch
    (choice,), rate = settled([batch], CURVES[name])
    assert bool(((choice.lengths >= 0) & (choice.lengths <= lengths)).all())
    best = max(tokens / seconds for tokens, seconds in every_cut(probabilities, lengths, CURVES[name]))
    assert rate == pytest.approx(best, rel=1e-6)
    chosen = [float(row[:length].sum()) for row, length in zip(probabilities, choice.lengths.tolist(), strict=True)]
    assert choice.tokens == pytest.approx(len(lengths) + sum(chosen), rel=1e-6)
    assert choice.seconds == CURVES[name](len(lengths) + int(choice.lengths.sum()))


@pytest.mark.parametrize("name", CURVES)
@deterministic
@given(st.lists(batches(most_requests=2, most_nodes=3), min_size=2, max_size=3))
def test_where_steps_differ_no_other_cuts_give_more_tokens_in_all_their_time(
    name: str, steps: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    _, rate = settled(steps, CURVES[name])
    cuts = product(*(every_cut(*each, CURVES[name]) for each in steps))
    best = max(sum(tokens for tokens, _ in each) / sum(seconds for _, seconds in each) for each in cuts)
    assert rate == pytest.approx(best, rel=1e-6)


def test_more_rows_than_there_are_costs_for_are_not_chosen() -> None:
    choice = choose(torch.ones(2, 3), torch.tensor([3, 3]), 2, torch.ones(4, dtype=torch.float64), rate=1.0)
    assert choice.lengths.tolist() == [3, 0]


def test_a_choice_says_how_probable_the_best_node_is_that_it_leaves() -> None:
    probabilities, lengths = torch.tensor([[0.9, 0.5, 0.2], [0.6, 0.3, 0.1]]), torch.tensor([3, 2])
    seconds = torch.arange(1, 7, dtype=torch.float64)
    for rate, chosen, left in ((0.4, [2, 1], 0.3), (0.25, [2, 2], 0.2), (0.1, [3, 2], 0.0)):
        choice = choose(probabilities, lengths, 2, seconds, rate)
        assert choice.lengths.tolist() == chosen
        assert choice.left == pytest.approx(left)


@deterministic
@given(batches(), st.integers(0, 20))
def test_a_number_leaves_the_most_probable_nodes(batch: tuple[torch.Tensor, torch.Tensor], most: int) -> None:
    probabilities, lengths = batch
    found = count_most_probable(probabilities, lengths, most)
    assert bool((found <= lengths).all())
    assert int(found.sum()) == min(most, int(lengths.sum()))
    kept = [float(p) for row, length in zip(probabilities, found.tolist(), strict=True) for p in row[:length]]
    left = [
        float(p)
        for row, first, last in zip(probabilities, found.tolist(), lengths.tolist(), strict=True)
        for p in row[first:last]
    ]
    assert min(kept, default=1.0) >= max(left, default=0.0)
