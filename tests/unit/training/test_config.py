# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.data.record_files import BadLines
from vllm_medusa.training.config import Medusa1Config, Medusa2Recipe, Recipe, TrainConfig, load_config

NEEDED = {"target": "T", "data": ["a.jsonl"], "output": "out"}
POSITIVE = [
    name
    for name, field in TrainConfig.model_fields.items()
    if any(getattr(bound, "ge", None) == 1 or getattr(bound, "gt", None) == 0 for bound in field.metadata)
]


def load(**settings: object) -> TrainConfig:
    return load_config(None, NEEDED | settings)


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_setting_says_what_it_means(name):
    assert (TrainConfig.model_fields[name].description or "").endswith((".", "..."))


def test_what_is_given_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**NEEDED, "num_heads": 3, "batch_size": 2}))
    config = load_config(file, {"batch_size": "16", "data": ["b.jsonl", "c.jsonl"]})
    assert (config.num_heads, config.batch_size, config.decay) == (3, 16, 0.8)
    assert config.data == (Path("b.jsonl"), Path("c.jsonl"))


def test_settings_survive_being_written_and_read(tmp_path):
    config = load(method="medusa2", lora_targets=["q_proj"], steps=30, dtype="bfloat16")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file, {}) == config


@deterministic
@given(name=st.sampled_from(POSITIVE), value=st.one_of(st.integers(max_value=0), st.floats(max_value=0)))
def test_a_value_out_of_bounds_is_refused_by_name_on_one_line(name, value):
    with pytest.raises(ValueError) as refusal:
        load(**{name: value})
    message = str(refusal.value)
    assert name in message
    assert repr(value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "unknown setting learning_rat; did you mean learning_rate"),
        ({"zzz": 1}, "unknown setting zzz; known settings: batch_size, "),
        ({"method": "medusa3"}, "method: input should be 'medusa1' or 'medusa2', got 'medusa3'"),
        ({"num_heads": "four"}, "num_heads: input should be a valid integer.*, got 'four'"),
        ({"data": []}, "data: tuple should have at least 1 item"),
        ({"lora_rank": 4}, "lora_rank is a setting of method 'medusa2', got 4 with 'medusa1'"),
        (
            {"method": "medusa2", "distill": True, "target_training": "full"},
            "distill must be false .* 'full', got true",
        ),
        ({"method": "medusa2", "quantization": "4bit", "target_training": "full"}, "quantization must be 'none'"),
        ({"method": "medusa2", "cache_hidden": True}, "cache_hidden must be false with method 'medusa2', got true"),
        ({"cache_directory": "c"}, "cache_directory is a setting of cache_hidden, got 'c' without it; set"),
        ({"optimizer": "sgd"}, "optimizer: input should be 'adamw' or 'muon', got 'sgd'"),
        ({"labels": "prompts"}, "labels: input should be 'answers' or 'all', got 'prompts'"),
        ({"heads_loss": "l2"}, "heads_loss: input should be 'cross_entropy' or 'kl', got 'l2'"),
        ({"block_length": 8, "num_heads": 7}, r"block_length must be at least 9 for 7 heads \(num_heads\), got 8"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps must be at most 5"),
        ({"heads_only_steps": -1}, "heads_only_steps: .* greater than or equal to 0, got -1"),
    ],
)
def test_wrong_settings_are_refused_on_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load(**settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("given", "done"), [({}, BadLines.REFUSE), ({"skip_bad": True}, BadLines.SKIP)])
def test_bad_lines_are_refused_unless_they_are_to_be_skipped(given, done):
    assert load(**given).bad_lines is done


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match="target is missing: The target: a directory"):
        load_config(None, {"data": ["a"], "output": "o"})


@pytest.mark.parametrize(("content", "message"), [("a: [1", "is no YAML"), ("- 1", "must hold a mapping")])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(file, NEEDED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("warmup_steps", 201),
        ("decay", 1.1),
        ("prompt_length", -1),
    ],
)
def test_the_api_refuses_a_wrong_setting_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        Medusa1Config(**{name: value})


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().num_heads = 2  # type: ignore[misc]


def test_the_papers_values_are_the_defaults_of_joint_training():
    recipe = Medusa2Recipe()
    assert (recipe.decay, recipe.learning_rate_ratio, recipe.heads_weight, recipe.lora_rank) == (0.8, 4.0, 0.2, 32)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "examples").glob("train_*.yaml")), ids=lambda file: file.name
)
def test_the_examples_are_right(file):
    assert load_config(file, {}).epochs == 2
