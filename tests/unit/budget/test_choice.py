# SPDX-License-Identifier: Apache-2.0
"""The most probable nodes of a batch are verified, as many as give the most tokens in a second."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.budget.choice import choose, count_most_probable

CURVES: dict[str, Callable[[int], float]] = {
    "flat to 64 rows, then linear": lambda rows: 1 + max(rows - 64, 0) / 16,
    "stepped": lambda rows: 1 + (rows - 1) // 4,
    "linear": lambda rows: 1 + 0.2 * rows,
    "steep": lambda rows: float(rows),
    "flat": lambda rows: 1.0,
}


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    num_reqs, num_nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    probability = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)
    rows = [sorted(draw(st.lists(probability, min_size=num_nodes, max_size=num_nodes)))[::-1] for _ in range(num_reqs)]
    lengths = draw(st.lists(st.integers(0, num_nodes), min_size=num_reqs, max_size=num_reqs))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(lengths)


def rate(probabilities: torch.Tensor, lengths: tuple[int, ...], cost: Callable[[int], float]) -> float:
    tokens = len(lengths) + sum(float(row[:length].sum()) for row, length in zip(probabilities, lengths, strict=True))
    return tokens / cost(len(lengths) + sum(lengths))


@pytest.mark.parametrize("name", CURVES)
@deterministic
@given(batches())
def test_no_other_cut_gives_more_tokens_in_a_second(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    probabilities, lengths = batch
    num_reqs, cost = len(lengths), CURVES[name]
    seconds = torch.tensor([cost(num_reqs + nodes) for nodes in range(int(lengths.sum()) + 1)], dtype=torch.float64)
    choice = choose(probabilities, lengths, num_reqs, seconds)
    assert bool(((choice.lengths >= 0) & (choice.lengths <= lengths)).all())
    every = product(*(range(length + 1) for length in lengths.tolist()))
    best = max(rate(probabilities, each, cost) for each in every)
    chosen = tuple(choice.lengths.tolist())
    assert rate(probabilities, chosen, cost) == pytest.approx(best, rel=1e-6)
    assert choice.tokens_per_second == pytest.approx(best, rel=1e-6)


def test_more_rows_than_there_are_costs_for_are_not_chosen() -> None:
    choice = choose(torch.ones(2, 3), torch.tensor([3, 3]), 2, torch.ones(4, dtype=torch.float64))
    assert choice.lengths.tolist() == [3, 0]


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
