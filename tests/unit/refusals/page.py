# SPDX-License-Identifier: Apache-2.0
"""The page of all refusals; ``python -m tests.unit.refusals.page`` writes it from what the cases say now."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import tests.conftest  # noqa: F401 - what the tests ask of the environment, before anything reads it
from tests.unit.refusals.case import PLACE, Case, Section
from tests.unit.refusals.commands import COMMANDS, DATA, EVAL
from tests.unit.refusals.conversions import CONVERSIONS
from tests.unit.refusals.heads import HEADS_GIVEN
from tests.unit.refusals.options import ENGINES, OPTIONS
from tests.unit.refusals.requests import REQUESTS

PAGE = Path(__file__).parents[3] / "docs" / "errors.md"

SECTIONS: tuple[Section, ...] = (OPTIONS, ENGINES, REQUESTS, HEADS_GIVEN, CONVERSIONS, EVAL, DATA, COMMANDS)

INTRODUCTION = f"""# Wrong inputs, and the line that each gets

What is wrong is refused before work begins, in one line that names the setting or file, its value and what is allowed.
{PLACE} stands for a directory. Pickles are read as tensors only: nothing that a file asks for is run.
Ctrl-C ends a command with one line too, and status 130; nothing half-written is left under its final name.

This page is written from the tests that check it (`tests/unit/refusals`):
`python -m tests.unit.refusals.page` writes it anew, and `make test` compares.
"""


def row(case: Case, line: str) -> str:
    """Return a case's row of the table."""
    return f"| {_cell(case.given)} | {_code(line)} |"


def page(line: Callable[[Case], str]) -> str:
    """Return the page, with each case's line as ``line`` gives it."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        rows = [row(case, line(case)) for case in section.cases]
        parts.append(
            "\n".join([f"## {section.title}", "", section.about, "", "| given | said |", "| --- | --- |", *rows, ""])
        )
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{_cell(text)}{fence}"


def line_in_new_directory(case: Case) -> str:
    """Return a case's line."""
    with tempfile.TemporaryDirectory() as directory:
        return case.line(Path(directory))


if __name__ == "__main__":
    PAGE.write_text(page(line_in_new_directory), encoding="utf-8")
    print(f"{PAGE}: {sum(len(section.cases) for section in SECTIONS)} wrong inputs")
