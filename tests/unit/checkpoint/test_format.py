# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch

from vllm_medusa.checkpoint.format import CONFIG_FILE, HeadsSpec, read_spec, read_state, write_heads

SPEC = HeadsSpec(hidden_size=8, vocab_size=16, num_heads=3, num_layers=2)
SPECS = [
    SPEC,
    replace(SPEC, fc_bias=False),
    replace(SPEC, shared_lm_head=True),
    HeadsSpec(hidden_size=8, vocab_size=16, num_heads=1, num_layers=1),
    replace(SPEC, draft_vocab_size=5),
    replace(SPEC, draft_vocab_size=5, shared_lm_head=True),
]


def random_state(spec: HeadsSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()}
    if "token_map" in state:
        state["token_map"] = torch.randperm(spec.vocab_size, generator=generator)[: spec.draft_vocab_size]
    return state


@pytest.mark.parametrize("spec", SPECS)
def test_a_written_checkpoint_reads_back_the_same(tmp_path, spec):
    state = random_state(spec)
    write_heads(tmp_path / "heads", spec, state, {"medusa_accuracies": [[0.5]]})
    assert read_spec(tmp_path / "heads") == spec
    read = read_state(tmp_path / "heads")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert json.loads((tmp_path / "heads" / CONFIG_FILE).read_text())["medusa_accuracies"] == [[0.5]]


@pytest.mark.parametrize("spec", SPECS)
def test_vllms_own_config_reads_the_same_sizes(tmp_path, spec):
    from vllm.transformers_utils.configs import medusa

    write_heads(tmp_path / "heads", spec, random_state(spec), {"trained_on": "code"})
    config = medusa.MedusaConfig.from_pretrained(tmp_path / "heads")
    assert (config.hidden_size, config.vocab_size) == (spec.hidden_size, spec.vocab_size)
    assert (config.num_heads, config.num_hidden_layers) == (spec.num_heads, spec.num_layers)
    assert (config.medusa_fc_bias, config.original_lm_head) == (spec.fc_bias, spec.shared_lm_head)
    assert config.truncated_vocab_size == (spec.draft_vocab_size or spec.vocab_size)


def test_tensor_names_are_those_of_vllm():
    assert list(HeadsSpec(4, 6, num_heads=2).shapes().items()) == [
        ("blocks.0.layers.0.weight", (4, 4)),
        ("blocks.0.layers.0.bias", (4,)),
        ("blocks.1.layers.0.weight", (4, 4)),
        ("blocks.1.layers.0.bias", (4,)),
        ("lm_heads.0.weight", (6, 4)),
        ("lm_heads.1.weight", (6, 4)),
    ]


def test_a_config_with_only_what_vllm_needs_gets_vllms_defaults():
    spec = HeadsSpec.from_config({"hidden_size": 8, "vocab_size": 16, "num_heads": 3})
    assert spec == HeadsSpec(8, 16, 3, num_layers=1, fc_bias=False, shared_lm_head=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": "eagle"}, "model_type must be"),
        ({"truncated_vocab_size": 17}, r"truncated_vocab_size must be at most vocab_size \(16\), got 17"),
    ],
)
def test_a_config_of_another_format_is_refused_by_name(change, message):
    config = {name: value for name, value in (SPEC.to_config() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        HeadsSpec.from_config(config)


def test_tensors_that_do_not_fit_the_spec_are_refused(tmp_path):
    state = random_state(SPEC)
    missing = {name: tensor for name, tensor in state.items() if name != "lm_heads.2.weight"}
    with pytest.raises(ValueError, match=r"lack lm_heads\.2\.weight"):
        write_heads(tmp_path / "heads", SPEC, missing)
    with pytest.raises(ValueError, match="unknown tensors: token_map"):
        write_heads(tmp_path / "heads", SPEC, state | {"token_map": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lm_heads.0.weight must have shape \(16, 8\)"):
        write_heads(tmp_path / "heads", SPEC, state | {"lm_heads.0.weight": torch.zeros(16, 9)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("token_map", "message"),
    [
        (torch.zeros(5), "token_map is of dtype float32; it must hold integers"),
        (
            torch.arange(5) + 12,
            r"token_map holds \[12, 13, 14\]...; it must hold 5 different tokens of the target's 16",
        ),
        (torch.zeros(5, dtype=torch.int64), r"token_map holds \[0, 0, 0\]...; it must hold 5 different"),
        (torch.arange(4), r"token_map must have shape \(5,\), got \(4,\)"),
    ],
)
def test_a_token_map_that_names_no_draft_vocabulary_is_refused(tmp_path, token_map, message):
    spec = replace(SPEC, draft_vocab_size=5)
    with pytest.raises(ValueError, match=message):
        write_heads(tmp_path / "heads", spec, random_state(spec) | {"token_map": token_map})


@pytest.mark.parametrize("size", [0, 16, 17])
def test_a_draft_vocabulary_is_smaller_than_the_vocabulary(size):
    with pytest.raises(ValueError, match=rf"draft_vocab_size must be within 1\.\.15 .*, got {size}"):
        replace(SPEC, draft_vocab_size=size)


@pytest.mark.parametrize("key", ["num_heads", "num_training_heads", "num_target_layers", "vocab_size"])
def test_extra_entries_that_vllm_would_take_for_sizes_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=key):
        write_heads(tmp_path / "heads", SPEC, random_state(SPEC), {key: 7})


def test_another_user_may_read_a_checkpoint(tmp_path):
    directory = write_heads(tmp_path / "heads", SPEC, random_state(SPEC))
    assert {path.stat().st_mode & 0o444 for path in (directory, *directory.iterdir())} == {0o444}


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    write_heads(tmp_path / "heads", SPEC, random_state(SPEC))
    (tmp_path / "heads" / "left-over").touch()
    smaller = replace(SPEC, num_heads=1)
    write_heads(tmp_path / "heads", smaller, random_state(smaller))
    assert read_spec(tmp_path / "heads") == smaller
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]
    assert not (tmp_path / "heads" / "left-over").exists()
