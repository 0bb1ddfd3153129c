# SPDX-License-Identifier: Apache-2.0
"""What the command says before any engine starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_medusa.cli import app
from vllm_medusa.demo.places import HEADS, MODEL, NATIVE_HEADS, QUESTIONS

ROOT = Path(__file__).parents[3]


def refusal(*options: str) -> str:
    """Return the one line with which the command refuses options."""
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    return line


def test_defaults_are_of_the_repository() -> None:
    assert not any(path.is_absolute() for path in (HEADS, NATIVE_HEADS, MODEL, QUESTIONS))
    assert (ROOT / QUESTIONS).is_file()


def test_outside_of_the_repository_the_command_says_where_the_questions_and_heads_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal() == (
        f"Error: {QUESTIONS} is not there: it is part of the project's repository, not of the installed package; run "
        "this in the repository's root, or name another with --questions"
    )
    assert f"{HEADS} is not there" in refusal("--questions", str(ROOT / QUESTIONS))
    assert not list(tmp_path.iterdir())


def test_another_model_is_not_fetched(tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    heads.mkdir()
    places = ["--questions", str(ROOT / QUESTIONS), "--heads", str(heads), "--model", str(tmp_path / "none")]
    assert f"--model: {tmp_path}/none holds no model; give a chat model's directory" in refusal(*places)


def test_the_command_line_is_light_to_import() -> None:
    code = (
        "import sys, vllm_medusa.cli; sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
