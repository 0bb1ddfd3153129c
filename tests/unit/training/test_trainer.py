# SPDX-License-Identifier: Apache-2.0
import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.unit.tiny_targets import build, counting
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.config import Medusa2Recipe, Recipe
from vllm_medusa.training.medusa1 import Medusa1, labelled
from vllm_medusa.training.medusa2 import Medusa2, Medusa2Trainer
from vllm_medusa.training.trainer import UNFINISHED, MedusaTrainer, training_arguments

MEDUSA1 = Recipe(num_heads=2, batch_size=4, learning_rate=1e-2, warmup_steps=1)
MUON = Recipe(**(MEDUSA1.model_dump() | {"optimizer": "muon"}))
LORA = Medusa2Recipe(**MEDUSA1.model_dump(), lora_rank=2, lora_dropout=0.1)
FULL = Medusa2Recipe(**MEDUSA1.model_dump(), target_training="full")


def trainer(recipe: Recipe, output: Path, family: str = "llama", **options: object) -> MedusaTrainer:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2} | options
    arguments = training_arguments(recipe, output, **options)
    data, held_out = labelled(counting(10, 0), 0), labelled(counting(4, 1), 0)
    for index, block in enumerate(data):
        block["labels"][: 2 * index] = IGNORED
    if isinstance(recipe, Medusa2Recipe):
        return Medusa2Trainer(Medusa2(build(family), recipe), recipe, arguments, data, held_out, show_progress=False)
    return MedusaTrainer(Medusa1(build(family), recipe), recipe, arguments, data, held_out, show_progress=False)


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", [MEDUSA1, LORA])
def test_a_checkpoint_holds_what_is_trained_and_never_the_frozen_target(tmp_path, recipe):
    trained = trainer(recipe, tmp_path)
    trained.fit()
    stored = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    expected = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    assert stored.keys() == expected
    assert all(name.startswith("heads.") or "lora_" in name for name in stored)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        path.name for path in (tmp_path / "checkpoint-6").iterdir()
    }
    moments = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt")["state"]
    assert len(moments) == len(expected)


@pytest.mark.parametrize(("recipe", "family"), [(MEDUSA1, "llama"), (MUON, "llama"), (LORA, "opt"), (FULL, "qwen3")])
def test_a_run_that_goes_on_ends_where_it_would_have_ended(tmp_path, recipe, family):
    whole = trainer(recipe, tmp_path / "whole", family)
    figures = whole.fit()
    stopped = trainer(recipe, tmp_path / "stopped", family)
    stopped.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert checkpoints(tmp_path / "stopped") == ["checkpoint-2", "checkpoint-4"]
    resumed = trainer(recipe, tmp_path / "stopped", family)
    assert resumed.fit(tmp_path / "stopped" / "checkpoint-4") == figures
    assert whole.trained_state().keys() == resumed.trained_state().keys()
    for name, tensor in whole.trained_state().items():
        assert torch.equal(tensor, resumed.trained_state()[name]), name
    optimizers = [torch.load(tmp_path / run / "checkpoint-6" / "optimizer.pt") for run in ("whole", "stopped")]
    torch.testing.assert_close(optimizers[0], optimizers[1], rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [MEDUSA1, LORA])
def test_muon_updates_the_matrices_of_the_heads_layers_alone(tmp_path, recipe):
    trained = trainer(type(recipe)(**(recipe.model_dump() | {"optimizer": "muon"})), tmp_path)
    trained.fit()
    parameters = dict(trained.model.named_parameters())
    state = trained.optimizer.state
    updated = {name for name, parameter in parameters.items() if "momentum" in state.get(parameter, ())}
    assert updated == {f"heads.blocks.{head}.layers.0.weight" for head in range(2)}
    others = {name for name, parameter in parameters.items() if "exp_avg" in state.get(parameter, ())}
    assert updated | others == {name for name, parameter in parameters.items() if parameter.requires_grad}


def test_muon_is_refused_where_matrices_are_divided(tmp_path):
    divided = trainer(MUON, tmp_path)
    divided.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="optimizer must be 'adamw' under FSDP, got 'muon'"):
        divided.create_optimizer()


def test_the_oldest_checkpoints_go(tmp_path):
    trainer(MEDUSA1, tmp_path, max_steps=12, save_total_limit=2).fit()
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("broken", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, broken):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MedusaTrainer, broken, full_disk)
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be written \(No space left on device\); make room"):
        trainer(MEDUSA1, tmp_path).fit()
    assert checkpoints(tmp_path) == []


def test_what_torch_says_of_a_full_disk_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def full_disk(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(MedusaTrainer, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(OSError, match=r"cannot be written \(.*file write failed\)"):
        trainer(MEDUSA1, tmp_path).fit()


def test_what_a_killed_run_left_half_written_is_swept_away(tmp_path):
    half = tmp_path / UNFINISHED / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    trainer(MEDUSA1, tmp_path, max_steps=2).fit()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")


def test_the_log_holds_the_parts_of_the_loss(tmp_path):
    joint = trainer(LORA, tmp_path)
    joint.fit()
    first = joint.state.log_history[0]
    assert first["loss"] == pytest.approx(first["target_loss"], rel=0.2)
    assert first["heads_loss"] > first["target_loss"]


@pytest.mark.parametrize("recipe", [MEDUSA1, LORA])
def test_accumulated_batches_are_one_larger_one_however_many_labels_each_has(tmp_path, recipe):
    recipe = type(recipe)(**(recipe.model_dump() | ({"lora_dropout": 0.0} if recipe is LORA else {})))
    half = type(recipe)(**(recipe.model_dump() | {"batch_size": 2}))
    whole = trainer(recipe, tmp_path / "a", max_steps=2)
    parts = trainer(half, tmp_path / "b", max_steps=2, gradient_accumulation_steps=2)
    whole.fit()
    parts.fit()
    torch.testing.assert_close(whole.trained_state(), parts.trained_state(), rtol=0, atol=1e-5)
    for one, other in zip(whole.state.log_history, parts.state.log_history, strict=True):
        losses = [name for name in one if name.endswith("loss")]
        assert {name: one[name] for name in losses} == pytest.approx({name: other[name] for name in losses}, rel=1e-4)


def test_half_precision_on_the_way_leaves_the_weights_in_full(tmp_path):
    trained = trainer(MEDUSA1, tmp_path, bf16=True)
    trained.fit()
    assert {tensor.dtype for tensor in trained.trained_state().values()} == {torch.float32}
