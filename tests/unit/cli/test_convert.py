# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.unit.own_code import with_code_of_its_own
from tests.unit.published import write_medusa2, write_original, write_target
from vllm_medusa.cli import app


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_says_what_it_wrote_and_how_to_serve_it(tmp_path: Path) -> None:
    write_original(tmp_path / "original", 3)
    result = convert(tmp_path / "original", tmp_path / "served")
    assert result.exit_code == 0
    sizes, serve = result.stdout.splitlines()
    assert sizes == (
        f"{tmp_path}/served: 3 heads of one residual layer, own LM heads, hidden size 8, 16 tokens, float16"
    )
    assert shlex.split(serve)[:3] == ["vllm", "serve", "TARGET"]
    assert shlex.split(serve)[4] == f'{{"method": "medusa", "model": "{tmp_path}/served"}}'
    assert (tmp_path / "served" / "model.safetensors").exists()


def test_the_command_writes_the_original_layout_on_request(tmp_path: Path) -> None:
    write_original(tmp_path / "original", with_lm_heads=False)
    write_target(tmp_path / "target")
    assert convert(tmp_path / "original", tmp_path / "served", "--target", tmp_path / "target").exit_code == 0
    result = convert(tmp_path / "served", tmp_path / "again", "--to", "original")
    assert "shared LM heads" in result.stdout
    assert "vllm serve" not in result.stdout
    assert (tmp_path / "again" / "medusa_lm_head.pt").exists()


def test_the_command_names_both_directories_of_a_whole_model(tmp_path: Path) -> None:
    write_medusa2(tmp_path / "whole")
    result = convert(tmp_path / "whole", tmp_path / "apart")
    assert f"{tmp_path}/apart/target: the model without its heads" in result.stdout
    assert f"vllm serve {tmp_path}/apart/target --speculative-config" in result.stdout


@pytest.mark.parametrize("arguments", [("missing", "output"), ("original", "original"), ("target", "output")])
def test_an_error_is_one_line_and_exits_with_2(tmp_path: Path, arguments: tuple[str, str]) -> None:
    write_original(tmp_path / "original")
    write_target(tmp_path / "target")
    result = convert(*(tmp_path / name for name in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_code_of_the_target_runs_if_it_is_trusted_and_not_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_original(tmp_path / "original", with_lm_heads=False)
    write_target(tmp_path / "target")
    with_code_of_its_own(tmp_path / "target", monkeypatch)
    arguments = [tmp_path / "original", tmp_path / "served", "--target", tmp_path / "target"]
    refused = convert(*arguments)
    assert refused.exit_code == 2
    assert "custom code" in refused.stderr
    trusting = convert(*arguments, "--trust-remote-code")
    assert trusting.exit_code == 0, trusting.stderr
