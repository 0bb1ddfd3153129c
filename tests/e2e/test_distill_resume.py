"""``vllm-medusa distill`` that is killed and started again writes what it would have written in one go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.distillation import DIALOGUE, write_chat_target, write_lines
from vllm_medusa.training.manifest import MANIFEST_FILE, Counts, Manifest

COMMAND = """
import os, signal, sys

name = sys.argv[1]
sys.argv[:2] = ["vllm-medusa"]
replace = os.replace

def replace_or_die(source, target):
    if os.path.basename(target) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die

from vllm_medusa.cli import app

app()
"""
"""The command, which is killed when a file of some name is written and about to get its place."""

ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 256}


def distill(
    directory: Path, target: Path, prompts: Path, dies_before: str = "", **settings: int
) -> subprocess.CompletedProcess[str]:
    """Run the command in a directory of its own, so that two runs have the same arguments."""
    directory.mkdir(exist_ok=True)
    options = {"max-tokens": 12, "shard-size": 3, **settings, "engine-args": json.dumps(ENGINE_ARGS)}
    flags = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    arguments = ["distill", str(prompts), "--output", "set", "--model", str(target), *flags]
    return subprocess.run(
        [sys.executable, "-c", COMMAND, dies_before, *arguments, "--temperature", "0", "--temperature", "0.9"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "set").iterdir()}


def test_a_run_that_is_killed_ends_with_the_files_of_one_that_is_not(tiny_target: Path, tmp_path: Path) -> None:
    target = write_chat_target(tiny_target, tmp_path / "target")
    prompts = write_lines(
        tmp_path / "prompts.jsonl", DIALOGUE, *({"prompt": f"def f{index}(x):"} for index in range(8))
    )
    done = distill(tmp_path / "whole", target, prompts)
    assert done.returncode == 0, done.stderr
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [MANIFEST_FILE, "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl"]

    cut = tmp_path / "cut"
    done = distill(cut, target, prompts, dies_before="shard-00001.jsonl")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(contents(cut)) == [".shard-00001.jsonl.tmp", MANIFEST_FILE, "shard-00000.jsonl"]
    assert not Manifest.read(cut / "set").finished

    done = distill(cut, target, prompts, **{"max-tokens": 13})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: set was begun with max_tokens 12, now it is 13; ")

    done = distill(cut, target, prompts)
    assert done.returncode == 0, done.stderr
    assert contents(cut) == whole
    manifest = Manifest.read(cut / "set")
    assert manifest.finished
    assert manifest.counts is not None
    assert done.stdout.splitlines()[-1] == f"set: 9 records of 9 prompts, {manifest.counts.tokens} tokens, in 3 files"
    assert manifest.counts == Counts(prompts=9, records=9, tokens=manifest.counts.tokens)
