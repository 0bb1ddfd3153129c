# SPDX-License-Identifier: Apache-2.0
"""Every command explains itself on a terminal of 80 columns."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vllm_medusa.cli import app

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    return result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_option_names_are_whole_and_defaults_plain(name: str) -> None:
    shown = help_of(name)
    options = [option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)]
    flags = [option for option in options if option.startswith("--")]
    assert flags
    assert [flag for flag in flags if not re.search(rf"(?<!\S){flag}(?!\S)", shown)] == []
    assert "…" not in shown
    assert not re.search(r"\[default:\s+[(\[]", shown)


def test_the_list_of_commands_cuts_nothing_short() -> None:
    shown = help_of()
    assert all(re.search(rf"^  {name}  +\S", shown, re.MULTILINE) for name in COMMANDS)
    assert not re.search(r"\.\.\.$|…", shown.partition("Commands:")[2], re.MULTILINE)
