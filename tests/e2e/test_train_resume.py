# SPDX-License-Identifier: Apache-2.0
"""A training process that is killed and started again ends where an undisturbed one ends, bit by bit."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.e2e.forked import run, run_command
from vllm_medusa.training.config import load_config
from vllm_medusa.training.run import run_training

NEVER = 0


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(settings: Path, kill_at: int) -> None:
    run_training(load_config(settings, {}), ["train"], show_progress=False, callbacks=[KillAt(kill_at)])


def train_on_a_small_disk(*arguments: str) -> None:
    """The process may write files of 1 MB and no more: the heads fit, the optimizer's state does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    run_command("train", *arguments)


def write_texts(file: Path) -> Path:
    source = Path(json.__file__).read_text()
    file.write_text("".join(json.dumps({"text": source[i : i + 400]}) + "\n" for i in range(0, len(source), 400)))
    return file


@pytest.mark.parametrize("method", ["medusa1", "medusa2"])
def test_a_killed_run_ends_in_the_same_weights_and_optimizer(tmp_path, tiny_target, method):
    data = write_texts(tmp_path / "texts.jsonl")
    shape = {"num_heads": 2, "block_length": 64, "batch_size": 4, "warmup_steps": 1, "steps": 7, "save_steps": 3}
    files = {}
    for name in ("whole", "killed"):
        files[name] = tmp_path / f"{name}.yaml"
        paths = {"target": str(tiny_target), "data": [str(data)], "output": str(tmp_path / name)}
        files[name].write_text(yaml.safe_dump({"method": method, **paths, **shape, "save_limit": 9}))

    assert run(train, files["whole"], NEVER, directory=tmp_path).code == 0
    assert run(train, files["killed"], 5, directory=tmp_path).code == -signal.SIGKILL
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
    assert not (tmp_path / "killed" / "heads").exists()
    assert run(train, files["killed"], NEVER, directory=tmp_path).code == 0

    written = ["heads", *(["target"] if method == "medusa2" else [])]
    for file in [f"{directory}/model.safetensors" for directory in written] + [
        "checkpoints/checkpoint-6/model.safetensors"
    ]:
        whole, killed = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[tensor], killed[tensor]) for tensor in whole), file
    optimizers = [torch.load(tmp_path / name / "checkpoints/checkpoint-6/optimizer.pt") for name in ("whole", "killed")]
    torch.testing.assert_close(optimizers[0], optimizers[1], rtol=0, atol=0)
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert figures[0] == figures[1]


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_half_written(tmp_path, tiny_target):
    data = write_texts(tmp_path / "texts.jsonl")
    output = tmp_path / "out"
    options = {"--target": tiny_target, "--data": data, "--output": output, "--block-length": 64, "--steps": 2}
    options |= {"--num-heads": 1, "--save-steps": 1, "--warmup-steps": 1, "--batch-size": 4}
    done = run(train_on_a_small_disk, *(str(part) for pair in options.items() for part in pair), directory=tmp_path)
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert done.code == 2, done.stderr
    assert len(errors) == 1
    assert str(output / "checkpoints") in errors[0]
    assert "Traceback" not in done.stderr
    assert list((output / "checkpoints").iterdir()) == []
    assert not (output / "heads").exists()
