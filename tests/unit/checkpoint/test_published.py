# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.unit.full_disk import largest_file
from tests.unit.published import (
    HIDDEN,
    VOCAB,
    State,
    original_module,
    write_medusa2,
    write_original,
    write_target,
)
from tests.unit.strategies import deterministic
from tests.unit.tiny_targets import all_logits
from vllm_medusa.checkpoint.conversion import Layout, convert
from vllm_medusa.checkpoint.conversion import write_target as write_target_of
from vllm_medusa.checkpoint.format import HeadsSpec, read_spec, read_state, write_heads
from vllm_medusa.checkpoint.weight_files import WeightFile, Weights
from vllm_medusa.training.heads import TrainableHeads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "target"
    write_target(directory)
    return directory


def assert_same(state: State, other: State) -> None:
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name])


def read_original(directory: Path) -> State:
    return torch.load(directory / "medusa_lm_head.pt", weights_only=True)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("with_lm_heads", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_original_heads_survive_the_way_there_and_back_bit_for_bit(
    tmp_path: Path, target: Path, dtype: torch.dtype, with_lm_heads: bool, num_layers: int
) -> None:
    state = write_original(tmp_path / "a", 3, num_layers, with_lm_heads=with_lm_heads, dtype=dtype)
    convert(tmp_path / "a", tmp_path / "b", Layout.SERVED, target)
    convert(tmp_path / "b", tmp_path / "c", Layout.ORIGINAL)
    assert_same(state, read_original(tmp_path / "c"))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config.items() >= json.loads((tmp_path / "a" / "config.json").read_text()).items()


@deterministic
@given(
    num_heads=st.integers(1, 4),
    fc_bias=st.booleans(),
    shared_lm_head=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_served_heads_survive_the_way_there_and_back_bit_for_bit(
    target: Path, num_heads: int, fc_bias: bool, shared_lm_head: bool, dtype: torch.dtype
) -> None:
    spec = HeadsSpec(HIDDEN, VOCAB, num_heads, fc_bias=fc_bias, shared_lm_head=shared_lm_head)
    state = {name: torch.randn(shape).to(dtype) for name, shape in spec.shapes().items()}
    if shared_lm_head:
        state["lm_heads.0.weight"] = load_file(target / "model.safetensors")["lm_head.weight"]
    extra = {"medusa_accuracies": [[0.5, 0.25]], "base_model_name_or_path": "some/model"}
    with tempfile.TemporaryDirectory() as directory:
        a, b, c = (Path(directory) / name for name in "abc")
        write_heads(a, spec, state, extra)
        convert(a, b, Layout.ORIGINAL)
        convert(b, c, Layout.SERVED, target)
        assert read_spec(c) == spec
        assert_same(state, read_state(c))
        assert json.loads((c / "config.json").read_text()) == json.loads((a / "config.json").read_text())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_converted_heads_compute_what_the_original_ones_do(tmp_path: Path, num_layers: int) -> None:
    write_original(tmp_path / "original", 3, num_layers, dtype=torch.float32)
    convert(tmp_path / "original", tmp_path / "served", Layout.SERVED)
    original = original_module(3, num_layers)
    original.load_state_dict(read_original(tmp_path / "original"))
    served = TrainableHeads(read_spec(tmp_path / "served"), torch.zeros(VOCAB, HIDDEN))
    served.load_state_dict(read_state(tmp_path / "served"))
    hidden = torch.randn(5, HIDDEN)
    torch.testing.assert_close(all_logits(served, hidden), torch.stack([head(hidden) for head in original]))


@pytest.mark.parametrize("fc_bias", [True, False])
def test_the_original_code_loads_what_is_written_for_it_without_a_name_left_over(tmp_path: Path, fc_bias: bool) -> None:
    spec = HeadsSpec(HIDDEN, VOCAB, 3, fc_bias=fc_bias)
    state = {name: torch.randn(shape) for name, shape in spec.shapes().items()}
    write_heads(tmp_path / "served", spec, state, {"base_model_name_or_path": "some/model"})
    convert(tmp_path / "served", tmp_path / "original", Layout.ORIGINAL)
    original = original_module(3, 1)
    original.load_state_dict(read_original(tmp_path / "original"), strict=True)
    served = TrainableHeads(spec, torch.zeros(VOCAB, HIDDEN))
    served.load_state_dict(state)
    hidden = torch.randn(5, HIDDEN)
    torch.testing.assert_close(torch.stack([head(hidden) for head in original]), all_logits(served, hidden))


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def as_vllm(state: State) -> State:
    return {
        f"lm_heads.{name[0]}.weight" if ".1." in name else f"blocks.{name[0]}.layers.0.{name.split('.')[-1]}": tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("file", "rename"),
    [
        ("medusa_lm_head.safetensors", dict),
        ("model.safetensors", dict),
        ("pytorch_model.bin", dict),
        ("medusa_lm_head.pt", prefixed("medusa_head.")),
        ("model.safetensors", prefixed("medusa_heads.")),
        ("model.safetensors", as_vllm),
        ("model.safetensors", lambda state: prefixed("medusa_heads.")(as_vllm(state))),
    ],
)
def test_every_published_layout_gives_the_same_heads(
    tmp_path: Path, file: str, rename: Callable[[State], State]
) -> None:
    state = write_original(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "expected", Layout.SERVED)
    (tmp_path / "plain" / "medusa_lm_head.pt").unlink()
    if file.endswith(".safetensors"):
        save_file(rename(state), tmp_path / "plain" / file)
    else:
        torch.save(rename(state), tmp_path / "plain" / file)
    convert(tmp_path / "plain", tmp_path / "served", Layout.SERVED)
    assert_same(read_state(tmp_path / "served"), read_state(tmp_path / "expected"))


def test_the_weights_say_how_many_heads_there_are_where_the_config_says_fewer(tmp_path: Path) -> None:
    """The config of the published heads for Vicuna 7B says 2, its weights hold 5."""
    write_original(tmp_path / "original", 5, medusa_num_heads=2)
    assert convert(tmp_path / "original", tmp_path / "served", Layout.SERVED).spec.num_heads == 5
    assert json.loads((tmp_path / "served" / "config.json").read_text())["base_model_name_or_path"] == "lmsys/vicuna"


@pytest.mark.parametrize("tied", [False, True])
def test_heads_without_lm_heads_share_the_targets(tmp_path: Path, tied: bool) -> None:
    write_original(tmp_path / "original", with_lm_heads=False, version="2")
    model = write_target(tmp_path / "target", tied=tied)
    assert convert(tmp_path / "original", tmp_path / "served", Layout.SERVED, tmp_path / "target").spec.shared_lm_head
    shared = read_state(tmp_path / "served")["lm_heads.0.weight"]
    assert torch.equal(shared, model.get_output_embeddings().weight)
    convert(tmp_path / "served", tmp_path / "back", Layout.ORIGINAL)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["version"] == "2"


@pytest.mark.parametrize("with_lm_heads", [True, False])
@pytest.mark.parametrize(("shards", "pickled"), [(1, False), (1, True), (4, False), (3, True)])
def test_a_whole_model_is_taken_apart_into_a_target_and_its_heads(
    tmp_path: Path, shards: int, pickled: bool, with_lm_heads: bool
) -> None:
    whole = write_medusa2(tmp_path / "whole", shards=shards, pickled=pickled, with_lm_heads=with_lm_heads)
    done = convert(tmp_path / "whole", tmp_path / "apart", Layout.SERVED)
    assert done.target == tmp_path / "apart" / "target"
    model, report = AutoModelForCausalLM.from_pretrained(done.target, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert not any(report.values())
    assert_same(dict(model.state_dict()), {name: whole[name] for name in whole if "medusa" not in name})
    heads = read_state(done.heads)
    assert torch.equal(heads["blocks.2.layers.0.bias"], whole["medusa_head.2.0.linear.bias"])
    lm_head = whole["medusa_head.0.1.weight" if with_lm_heads else "lm_head.weight"]
    assert torch.equal(heads["lm_heads.0.weight"], lm_head)
    assert json.loads((done.heads / "config.json").read_text())["base_model_name_or_path"] == str(done.target)
    assert not any("medusa" in key for key in json.loads((done.target / "config.json").read_text()))
    assert (done.target / "tokenizer.json").exists()


def test_no_two_files_of_a_model_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_medusa2(tmp_path / "whole", shards=4)
    loaded: list[list[weakref.ref[torch.Tensor]]] = []

    def load(self: WeightFile, names: list[str]) -> State:
        assert not any(reference() is not None for file in loaded for reference in file)
        tensors = original(self, names)
        loaded.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    original = WeightFile.load
    monkeypatch.setattr(WeightFile, "load", load)
    write_target_of(tmp_path / "whole", Weights.find(tmp_path / "whole"), {}, tmp_path / "target")
    assert len(loaded) == 4


@pytest.mark.parametrize("layout", Layout)
def test_the_target_names_the_model_of_heads_that_do_not(tmp_path: Path, target: Path, layout: Layout) -> None:
    spec = HeadsSpec(HIDDEN, VOCAB, 1)
    write_heads(tmp_path / "heads", spec, {name: torch.zeros(shape) for name, shape in spec.shapes().items()})
    convert(tmp_path / "heads", tmp_path / "named", layout, target, base_model="some/model")
    assert json.loads((tmp_path / "named" / "config.json").read_text())["base_model_name_or_path"] == "some/model"
    convert(tmp_path / "named", tmp_path / "kept", layout, target, base_model="another/model")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["base_model_name_or_path"] == "some/model"
    with pytest.raises(
        ValueError, match=r"does not name the heads' model .*, which the original code needs; give --target"
    ):
        convert(tmp_path / "heads", tmp_path / "nameless", Layout.ORIGINAL)


def test_layers_that_the_original_code_would_take_for_one_are_refused(tmp_path: Path) -> None:
    spec = HeadsSpec(HIDDEN, VOCAB, 2, num_layers=2)
    write_heads(tmp_path / "served", spec, {name: torch.randn(shape) for name, shape in spec.shapes().items()})
    with pytest.raises(ValueError, match=r"blocks\.0\.layers\.0\.bias and blocks\.0\.layers\.1\.bias differ"):
        convert(tmp_path / "served", tmp_path / "original", Layout.ORIGINAL)


@pytest.mark.parametrize("layout", Layout)
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, layout: Layout) -> None:
    write_original(tmp_path / "original", 4)
    with largest_file(1024), pytest.raises((OSError, SafetensorError), match="too large"):
        convert(tmp_path / "original", tmp_path / "output", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
