"""Training in two processes, as on two devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ONE = [sys.executable, "-m"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def test_two_processes_train_as_one_with_a_batch_twice_as_large(tmp_path, tiny_target):
    data = tmp_path / "texts.txt"
    data.write_text(Path(json.__file__).read_text())
    options = {"--target": tiny_target, "--data": data, "--method": "medusa2", "--lora-dropout": 0, "--num-heads": 2}
    options |= {"--block-length": 64, "--steps": 4, "--heads-only-steps": 1, "--warmup-steps": 1}
    original = load_file(tiny_target / "model.safetensors")
    changes, blocks = {}, {}
    for name, launcher, batch in (("one", ONE, 4), ("two", TWO, 2)):
        run = options | {"--output": tmp_path / name, "--batch-size": batch}
        arguments = [str(part) for pair in run.items() for part in pair]
        done = subprocess.run(
            [*launcher, "vllm_medusa.cli", "train", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("vllm serve") == 1
        target, heads = (load_file(tmp_path / name / part / "model.safetensors") for part in ("target", "heads"))
        changes[name] = torch.cat([(target[key] - original[key]).flatten() for key in sorted(original)])
        blocks[name] = torch.cat([heads[key].flatten() for key in sorted(heads) if key.startswith("blocks.")])
    for one, two in ((changes["one"], changes["two"]), (blocks["one"], blocks["two"])):
        assert one.norm() > 0
        assert (one - two).norm() < 1e-3 * one.norm()
