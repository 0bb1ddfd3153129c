# SPDX-License-Identifier: Apache-2.0
"""Training in two processes, as on two devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.e2e.forked import run, run_command

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def test_two_processes_train_as_one_with_a_batch_twice_as_large(tmp_path, tiny_target):
    """Though the processes do not have as many labels each: a line is a text, and a block's end is padding."""
    data = tmp_path / "texts.txt"
    data.write_text(Path(json.__file__).read_text())
    options = {"--target": tiny_target, "--data": data, "--method": "medusa2", "--lora-dropout": 0, "--num-heads": 2}
    options |= {"--block-length": 64, "--steps": 4, "--heads-only-steps": 1, "--warmup-steps": 1, "--logging-steps": 1}
    one, two = (
        [str(part) for pair in (options | changes).items() for part in pair]
        for changes in (
            {"--output": tmp_path / "one", "--batch-size": 4},
            {"--output": tmp_path / "two", "--batch-size": 2},
        )
    )
    alone = run(run_command, "train", *one, directory=tmp_path)
    assert alone.code == 0, alone.stderr
    command = [*TWO_PROCESSES, "vllm_medusa.cli", "train", *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("vllm serve") == 1

    start = load_file(tiny_target / "model.safetensors")
    start |= {f"lm_heads.{head}.weight": start["lm_head.weight"] for head in range(2)}
    for part in ("target", "heads"):
        by_one, by_two = (load_file(tmp_path / name / part / "model.safetensors") for name in ("one", "two"))
        learnt, learnt_by_two = (
            torch.cat([(weights[key] - start.get(key, 0)).flatten() for key in sorted(weights)])
            for weights in (by_one, by_two)
        )
        assert learnt.norm() > 0
        assert (learnt - learnt_by_two).norm() < 1e-3 * learnt.norm(), part
    logs = [losses(tmp_path / name / "checkpoints" / "checkpoint-4") for name in ("one", "two")]
    assert len(logs[0]) == 4
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-3, atol=0)


def test_two_processes_share_a_cache_of_hidden_states(tmp_path, tiny_target):
    """One of them writes it, and both read it."""
    data = tmp_path / "texts.txt"
    data.write_text(Path(json.__file__).read_text())
    options = {"--target": tiny_target, "--data": data, "--heads-loss": "kl", "--draft-vocab": 300, "--num-heads": 2}
    options |= {"--block-length": 64, "--steps": 4, "--warmup-steps": 1, "--logging-steps": 1}
    one, two = (
        ["train", "--cache-hidden", *(str(part) for pair in (options | changes).items() for part in pair)]
        for changes in (
            {"--output": tmp_path / "one", "--batch-size": 4},
            {"--output": tmp_path / "two", "--batch-size": 2},
        )
    )
    alone = run(run_command, *one, directory=tmp_path)
    assert alone.code == 0, alone.stderr
    command = [*TWO_PROCESSES, "vllm_medusa.cli", *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Hidden states are kept in") == 1
    assert (tmp_path / "two" / "hidden_states" / "hidden.bin").stat().st_size == (
        (tmp_path / "one" / "hidden_states" / "hidden.bin").stat().st_size
    )
    by_one, by_two = (load_file(tmp_path / name / "heads" / "model.safetensors") for name in ("one", "two"))
    assert torch.equal(by_one["token_map"], by_two["token_map"])
    learnt, learnt_by_two = (
        torch.cat([weights[key].flatten() for key in sorted(weights) if key.startswith("blocks.")])
        for weights in (by_one, by_two)
    )
    assert learnt.norm() > 0
    assert (learnt - learnt_by_two).norm() < 1e-2 * learnt.norm()
    logs = [losses(tmp_path / name / "checkpoints" / "checkpoint-4") for name in ("one", "two")]
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-3, atol=0)


def losses(checkpoint: Path) -> list[dict[str, float]]:
    """What was logged of each step's loss and its parts."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in entry if name.endswith("loss")} for entry in log if "loss" in entry]
