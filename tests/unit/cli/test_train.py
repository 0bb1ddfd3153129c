# SPDX-License-Identifier: Apache-2.0
import pytest
from typer.testing import CliRunner

from vllm_medusa.cli import app
from vllm_medusa.training.config import TrainConfig

NEEDED = ["train", "--target", "T", "--data", "a.jsonl", "--output", "out"]


@pytest.fixture
def asked(monkeypatch):
    """The configs of the training runs, which are not started."""
    configs = []
    monkeypatch.setattr("vllm_medusa.training.run.run_training", lambda config, command: configs.append(config))
    return configs


def test_every_setting_is_an_option():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output
    assert [name for name in TrainConfig.model_fields if f"--{name.replace('_', '-')} " not in shown] == []


def test_options_are_read_by_their_fields_types_and_win_over_the_file(asked, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("num_heads: 3\nseed: 5\n")
    options = [
        "--seed",
        "7",
        "--data",
        "b.jsonl",
        "--distill",
        "--skip-bad",
        "--method",
        "medusa2",
        "--learning-rate",
        "3e-4",
    ]
    result = CliRunner().invoke(app, [*NEEDED, "--config", str(file), *options])
    assert result.exit_code == 0, result.output
    (config,) = asked
    assert (config.num_heads, config.seed, config.distill, config.learning_rate) == (3, 7, True, 3e-4)
    assert config.skip_bad
    assert [str(file) for file in config.data] == ["a.jsonl", "b.jsonl"]


def test_a_switch_of_the_file_can_be_turned_off(asked, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("gradient_checkpointing: true\n")
    result = CliRunner().invoke(app, [*NEEDED, "--config", str(file), "--no-gradient-checkpointing"])
    assert result.exit_code == 0, result.output
    assert not asked[0].gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "-1"], "Error: learning_rate: input should be greater than 0, got '-1'\n"),
        (["--config", "absent.yaml"], "Error: [Errno 2] No such file or directory: 'absent.yaml'\n"),
        (["--quantization", "4bit"], "bitsandbytes"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("vllm_medusa.training.run.load_tokenizer", lambda config: None)
    monkeypatch.setattr("vllm_medusa.training.run.load_data", lambda config, tokenizer: (None, None))
    result = CliRunner().invoke(app, [*NEEDED, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
