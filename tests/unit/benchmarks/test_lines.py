# SPDX-License-Identifier: Apache-2.0
"""Each figure is reported beside its floor and its goal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from gpu_bench.lines import Goal, Line, print_lines
from gpu_bench.report import Report
from gpu_bench.roofline import Bound, Floor

FLOOR = Floor(8e-6, Bound.BYTES)


def test_a_time_and_its_floor_are_in_the_lines_unit() -> None:
    line = Line.timed("attention", "8 rows", 10e-6, "µs", FLOOR)
    assert (line.value, line.floor, line.share) == pytest.approx((10, 8, 0.8))
    assert line.met is None


@pytest.mark.parametrize(("taken", "met"), [(9.9e-6, True), (10.1e-6, False)])
def test_a_goal_in_shares_of_the_floor_is_met_from_that_share_on(taken: float, met: bool) -> None:
    assert Line.timed("attention", "", taken, "µs", FLOOR, goal=Goal(least_share=0.8)).met is met


@pytest.mark.parametrize(("value", "met"), [(1.08, True), (1.09, False)])
def test_a_goal_at_most_is_met_up_to_that_figure(value: float, met: bool) -> None:
    assert Line("step", "", value, goal=Goal(most=1.08)).met is met


def test_the_table_shows_figure_floor_share_bound_goal_and_whether_it_is_met() -> None:
    console = Console(record=True, width=160)
    with console.capture() as captured:
        goals = Goal(least_share=0.8), Goal(most=5)
        print_lines(
            [
                Line.timed("attention", "64 rows", 16e-6, "µs", FLOOR, goal=goals[0]),
                Line("proposal", "launches", 3, goal=goals[1], note="counted"),
                Line("attention", "error", 2.34e-7),
                Line("step", "in plain steps", 1.0449, floor=1.0214),
            ],
            console,
        )
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in captured.get().splitlines() if "│" in row]
    assert rows == [
        ["64 rows", "16 µs", "8 µs", "50%", "bytes", "at least 80%", "NO", ""],
        ["launches", "3", "", "", "", "at most 5", "yes", "counted"],
        ["error", "2.3e-07", "", "", "", "", "", ""],
        ["in plain steps", "1.045", "1.021", "98%", "", "", "", ""],
    ]


def test_the_file_is_whole_after_each_figure_and_each_failure(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", {"command": "python"})
    report.add([Line.timed("attention", "64 rows", 16e-6, "µs", FLOOR, details={"rows": 64})])
    (line,) = json.loads(report.output.read_text())["lines"]
    assert (line["value"], line["share_of_floor"], line["bound"], line["rows"]) == (pytest.approx(16), 0.5, "bytes", 64)
    report.fail("static", RuntimeError("ended early"))
    stored = json.loads(report.output.read_text())
    assert (stored["command"], stored["failures"]) == ("python", {"static": "ended early"})
