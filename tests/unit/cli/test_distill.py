# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.toy.tokenizer import train_tokenizer
from tests.unit.stub_server import CHAT, MODELS, serve
from vllm_medusa.cli import app


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a prompt\n")
    return path


def refusal(*arguments: object) -> str:
    """Run the command, which refuses in one line and exits with 2."""
    result = CliRunner().invoke(app, ["distill", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    return line.removeprefix("Error: ")


def test_wrong_settings_are_refused_in_one_line(prompts: Path, tmp_path: Path):
    output = ("--output", tmp_path / "set")
    model = ("--model", tmp_path)
    assert refusal(prompts, *output).startswith("model is missing: The target: a directory or a repository")
    assert "temperature" in refusal(prompts, *output, *model, "--temperature", "-1")
    assert refusal(prompts, *output, *model, "--engine-args", "{").startswith("engine-args: '{' is not JSON")
    for wrong in ("[]", '{"model": "other"}'):
        line = refusal(prompts, *output, *model, "--engine-args", wrong)
        assert line.startswith('engine-args: must be a JSON object without "model"')
    assert refusal(prompts, *output, *model).startswith(f"model '{tmp_path}' has no tokenizer that can be loaded")
    assert not (tmp_path / "set").exists()


def test_prompts_come_from_files_or_from_the_target(prompts: Path, tmp_path: Path):
    train_tokenizer(["text"], vocab_size=300).save_pretrained(tmp_path / "model")
    options = ("--output", tmp_path / "set", "--model", tmp_path / "model")
    own = (*options, "--self-prompts", 8)
    assert refusal(*options) == "there are no prompts: give files, or --self-prompts N"
    assert refusal(prompts, *own) == f"both {prompts} and --self-prompts are given; give one of them"
    assert refusal(prompts, *options, "--prompt-top-p", 0.5).startswith(
        "prompt-top-p is about the target's own prompts"
    )
    assert refusal(*own, "--style", "completion").startswith("self-prompts are a chat model's user turns")
    assert refusal(*own, "--prompt-top-p", 2).startswith("prompt_top_p")
    assert "has no chat template" in refusal(*own)
    assert "give its directory as --tokenizer" in refusal(*own[:2], "--model", "m", "--self-prompts", 8, "--url", "u")
    assert not (tmp_path / "set").exists()


def test_a_line_without_a_prompt_is_refused_before_a_model_is_loaded(tmp_path: Path):
    train_tokenizer(["text"], vocab_size=300).save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": \n')
    line = refusal(prompts, "--output", tmp_path / "set", "--model", tmp_path / "model")
    bad = f"{prompts}:2: not JSON: Expecting value at character 11"
    assert line == f"{bad}; correct the line, or skip such lines with --skip-bad"
    assert refusal(tmp_path / "none.txt", "--output", tmp_path / "set", "--model", tmp_path / "model").startswith(
        "[Errno 2] No such file or directory"
    )


def test_a_server_is_asked_and_the_set_summed_up(prompts: Path, tmp_path: Path):
    output = tmp_path / "set"
    with serve(models=(200, MODELS), chat_completions=(200, CHAT)) as (url, script):
        arguments = ["distill", str(prompts), "--output", str(output), "--url", url, "--model", "tiny"]
        result = CliRunner().invoke(app, [*arguments, "--temperature", "0.5", "--max-tokens", "7"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{output}: 1 records of 1 prompts, 2 tokens, in 1 files"
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "shard-00000.jsonl"]
    assert [(request["temperature"], request["max_tokens"]) for request in script.requests] == [(0.5, 7)]
    assert refusal(prompts, "--output", tmp_path / "other", "--url", url, "--model", "tiny").startswith(
        f"no answer from {url}: "
    )


def test_a_line_without_a_prompt_is_skipped_and_counted_on_demand(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": \n')
    with serve(models=(200, MODELS), chat_completions=(200, CHAT)) as (url, _):
        options = ["--output", str(tmp_path / "set"), "--url", url, "--model", "tiny", "--skip-bad"]
        result = CliRunner().invoke(app, ["distill", str(prompts), *options])
    assert result.exit_code == 0, result.output
    assert "1 records of 1 prompts" in result.stdout
    assert caplog.messages == [
        f"bad lines skipped: 1; the first is {prompts}:2: not JSON: Expecting value at character 11"
    ]
