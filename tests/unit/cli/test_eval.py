# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.unit.evaluated import HEADS, PROMPTS, write_random_heads, write_target
from tests.unit.own_code import with_code_of_its_own
from vllm_medusa.cli import app


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_target(directory / "target")
    write_random_heads(directory / "heads")
    (directory / "prompts.txt").write_text("\n".join(PROMPTS))
    return directory


def evaluate(models: Path, heads: Path, *arguments: object) -> Result:
    options = ["eval", "--model", models / "target", "--heads", heads, "--prompts", models / "prompts.txt"]
    return CliRunner().invoke(app, list(map(str, [*options, "--new-tokens", 8, *arguments])))


def test_the_command_prints_tables_and_leaves_numbers_a_picture_and_the_tree(models: Path, tmp_path: Path) -> None:
    heads = shutil.copytree(models / "heads", tmp_path / "heads")
    files = ["--output", tmp_path / "eval.json", "--plot", tmp_path / "eval.png"]
    result = evaluate(models, heads, "--write", "--nodes", 6, "--ranks", 5, *files)
    assert result.exit_code == 0, result.output
    assert "Right token among a head's first" in result.stdout
    assert "Expected tokens per step" in result.stdout
    assert "Scores of the nodes of dynamic trees" in result.stdout
    assert (
        "wrote medusa_accuracies, medusa_temperatures and medusa_lookup_weights, and as medusa_tree"
        in result.stdout.replace("\n", " ")
    )
    results = json.loads((tmp_path / "eval.json").read_text())
    assert (len(results["medusa_accuracies"]), len(results["medusa_accuracies"][0])) == (HEADS, 5)
    assert results["texts"] == len(PROMPTS)
    trees = [(tree["kind"], tree["nodes"]) for tree in results["expected_acceptance_length"]]
    assert trees == [("chain", HEADS), ("best", 4), ("best", 8), ("best", 16), ("best", 32), ("best", 64)]
    lengths = [tree["tokens_per_step"] for tree in results["expected_acceptance_length"][1:]]
    assert lengths == sorted(lengths)
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((heads / "config.json").read_text())
    assert len(config["medusa_tree"]) == 6
    assert config["medusa_accuracies"] == results["medusa_accuracies"]
    assert config["medusa_temperatures"] == results["medusa_temperatures"]
    assert len(config["medusa_temperatures"]) == HEADS
    assert config["medusa_lookup_weights"] == results["medusa_lookup_weights"]
    assert len(config["medusa_lookup_weights"]) == HEADS
    for scores in (results["scores"]["before"], results["scores"]["after"]):
        assert len(scores["depths"]) == HEADS
        assert all(0 <= depth["expected_calibration_error"] <= 1 for depth in scores["depths"])


def test_heads_measured_alone_are_written_without_weights_of_lookups(models: Path, tmp_path: Path) -> None:
    heads = shutil.copytree(models / "heads", tmp_path / "heads")
    assert evaluate(models, heads, "--write").exit_code == 0
    assert "medusa_lookup_weights" in json.loads((heads / "config.json").read_text())
    assert evaluate(models, heads, "--write", "--no-lookup").exit_code == 0
    assert "medusa_lookup_weights" not in json.loads((heads / "config.json").read_text())


def test_the_target_may_be_loaded_in_another_dtype(models: Path) -> None:
    assert evaluate(models, models / "heads", "--dtype", "bfloat16").exit_code == 0
    refused = evaluate(models, models / "heads", "--dtype", "int8")
    assert refused.exit_code == 2
    assert "'int8' is not one of" in refused.stderr


def test_code_of_the_target_runs_if_it_is_trusted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(models, tmp_path / "models")
    with_code_of_its_own(copied / "target", monkeypatch)
    refused = evaluate(copied, copied / "heads")
    assert refused.exit_code == 2
    assert "custom code" in refused.stderr
    trusting = evaluate(copied, copied / "heads", "--trust-remote-code")
    assert trusting.exit_code == 0, trusting.output


def test_nothing_is_written_unasked(models: Path, tmp_path: Path) -> None:
    heads = shutil.copytree(models / "heads", tmp_path / "heads")
    before = (heads / "config.json").read_bytes()
    assert evaluate(models, heads).exit_code == 0
    assert (heads / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_a_bad_line_is_refused_or_on_demand_skipped(models: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f("}\n{"prompt": \n')
    refused = evaluate(models, models / "heads", "--prompts", prompts)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"Error: {prompts}:2: not JSON: ")
    skipped = evaluate(models, models / "heads", "--prompts", prompts, "--skip-bad")
    assert skipped.exit_code == 0, skipped.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 1, "--nodes", 4, "--write"], "3 heads and --ranks 1 give trees of up to 3 nodes, got --nodes 4"),
        (["--data", "some.jsonl"], "give either --prompts"),
        (["--new-tokens", 8, "--max-length", 4], "new_tokens must be less than max_length (4), got 8"),
        (["--heads", "missing"], "missing"),
        (["--model", "missing"], "missing is neither a directory nor a repository"),
        (["--prompts", "missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--output", "missing/eval.json"], "missing/eval.json cannot be written, there is no directory missing"),
        (["--output", "/sys/eval.json"], "/sys/eval.json cannot be written ("),
        (["--plot", "/sys"], "/sys cannot be written (Is a directory)"),
        (["--style", "chat"], "has no chat template"),
    ],
)
def test_an_error_is_one_line_and_exits_with_2(models: Path, arguments: list[object], message: str) -> None:
    result = evaluate(models, models / "heads", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
