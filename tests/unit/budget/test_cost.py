# SPDX-License-Identifier: Apache-2.0
"""What rows cost: measured, followed while serving, kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.strategies import deterministic
from vllm_medusa.budget.cost import CostTable, Curve
from vllm_medusa.budget.store import Costs, costs_file

CURVE = Curve(sizes=(1, 2, 4, 8, 16), seconds=(1.0, 1.25, 1.5, 3.0, 6.0))
COSTS = Costs(verification=CURVE, proposal=Curve(sizes=(1,), seconds=(0.5,)))


def test_before_anything_is_observed_a_table_is_what_was_measured_linear_between_and_beyond() -> None:
    table = CostTable(CURVE, 64)
    assert table.between(1, 6).tolist() == pytest.approx([1.0, 1.25, 1.375, 1.5, 1.875, 2.25])
    assert table.at(64) == pytest.approx(6 + 48 * 3 / 8)


def test_a_single_measured_size_grows_in_proportion() -> None:
    assert CostTable(Curve(sizes=(1,), seconds=(0.5,)), 8).between(1, 8).tolist() == pytest.approx(
        [0.5 * size for size in range(1, 9)]
    )


@deterministic
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 100.0)), max_size=60))
def test_whatever_is_observed_more_rows_never_cost_less(observed: list[tuple[int, float]]) -> None:
    table = CostTable(CURVE, 64)
    for size, seconds in observed:
        table.observe(size, seconds)
    found = table.between(1, 64)
    assert bool((found > 0).all())
    assert bool((np.diff(found) >= 0).all())


def test_a_table_comes_to_what_is_observed() -> None:
    """The true curve has another shape and another height than the measured one."""
    table = CostTable(CURVE, 64)
    for step in range(600):
        size = (1, 3, 6, 12)[step % 4]
        table.observe(size, 1.5 + 0.2 * size)
    for size in (1, 6, 12):
        assert table.at(size) == pytest.approx(1.5 + 0.2 * size, rel=0.08)


def test_a_machine_that_slows_down_does_so_at_sizes_that_are_not_visited_too() -> None:
    table = CostTable(CURVE, 64)
    for _ in range(300):
        table.observe(2, 2 * 1.25)
    assert table.at(2) == pytest.approx(2.5, rel=0.01)
    assert table.at(16) == pytest.approx(12.0, rel=0.05)


def test_a_size_that_was_last_visited_while_the_machine_was_slow_is_no_dearer_beside_others() -> None:
    table = CostTable(CURVE, 64)
    for _ in range(100):
        table.observe(2, 1.25)
        table.observe(8, 3.0)
    for size, seconds in ((2, 1.5 * 1.25), (8, 3.0)):
        for _ in range(12):
            table.observe(size, seconds)
    assert table.at(8) == pytest.approx(3.0, rel=0.1)
    assert table.at(8) / table.at(2) == pytest.approx(3.0 / 1.25, rel=0.1)


def test_one_disturbed_step_changes_little() -> None:
    table = CostTable(CURVE, 64)
    for _ in range(100):
        table.observe(4, 1.5)
    table.observe(4, 1000.0)
    assert table.at(4) == pytest.approx(1.5, rel=0.03)


def test_rounds_say_what_a_size_takes_beside_others_though_the_machine_slows_down_between_them() -> None:
    true = np.array([1.0, 1.25, 1.5])
    times = np.array([1.0, 3.0, 1.1, 0.9, 2.0])[:, None] * true
    times[3, 0] *= 5  # Something else ran.
    found = np.array(Curve.of_rounds((1, 2, 4), times).seconds)
    assert found / found[0] == pytest.approx(true, rel=1e-6)
    assert 1.0 <= found[0] <= 2.0


def test_of_rounds_no_size_takes_longer_than_a_larger_one() -> None:
    assert Curve.of_rounds((1, 2, 4), np.array([[1.0, 2.0, 1.5]] * 3)).seconds == pytest.approx((1.0, 1.5, 1.5))


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((1, 1), (1.0, 1.0)), ((0,), (1.0,)), ((1,), (0.0,))],
)
def test_a_curve_ascends_from_one_and_takes_time(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        Curve(sizes=sizes, seconds=seconds)


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = costs_file(tmp_path / "new", {"cpu": "one"})
    assert Costs.read(file) is None
    COSTS.write(file)
    assert Costs.read(file) == COSTS
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert costs_file(tmp_path / "new", {"cpu": "another"}) != file


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"verification": 3}', COSTS.model_dump_json().encode()[:-9]],
)
def test_a_broken_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "costs.json"
    file.write_bytes(content)
    assert Costs.read(file) is None


def test_times_that_are_no_times_are_as_none(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    for wrong in ("-1.0", "0.0", "NaN", "Infinity", '"fast"'):
        file.write_text(COSTS.model_dump_json().replace("1.25", wrong))
        assert Costs.read(file) is None
