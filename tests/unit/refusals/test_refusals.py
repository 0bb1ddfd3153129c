# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.refusals.case import Case
from tests.unit.refusals.options import ENGINES, OPTIONS
from tests.unit.refusals.page import PAGE, SECTIONS, page, row

OF_ENGINES = (OPTIONS, ENGINES)
"""What an engine refuses, on either model runner."""

CASES = [
    pytest.param(case, id=case.given[:60], marks=[pytest.mark.both_runners] if section in OF_ENGINES else [])
    for section in SECTIONS
    for case in section.cases
]

STALE = "docs/errors.md says otherwise; write it anew with python -m tests.unit.refusals.page"


@pytest.fixture(scope="module")
def rows() -> list[str]:
    return PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_input_is_refused_in_one_line_that_names_it_as_the_page_says(
    case: Case, tmp_path: Path, rows: list[str]
) -> None:
    line = case.line(tmp_path)
    for name in case.names:
        assert name in line
    assert row(case, line) in rows, STALE


def test_the_page_holds_these_wrong_inputs_and_no_others(rows: list[str]) -> None:
    def given(lines: list[str]) -> list[str]:
        return [line.rpartition(" | `")[0] if line.startswith("| ") else line for line in lines]

    assert given(rows) == given(page(lambda case: "").splitlines()), STALE
