"""``vllm-medusa distill`` that is killed and started again writes what it would have written in one go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}# {{ message['role'] }}{{ '\n' }}{{ message['content'] }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}# assistant{{ '\n' }}{% endif %}"
)
ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 256}


@pytest.fixture
def chat_target(tiny_target: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    for file in tiny_target.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    turns = [{"from": speaker, "value": f"class A{speaker}:"} for speaker in ("human", "gpt", "human")]
    values = [{"conversations": turns}, *({"prompt": f"def f{number}(x):"} for number in range(8))]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


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


def test_a_run_that_is_killed_ends_with_the_files_of_one_that_is_not(
    chat_target: Path, prompts: Path, tmp_path: Path
) -> None:
    done = distill(tmp_path / "whole", chat_target, prompts)
    assert done.returncode == 0, done.stderr
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [MANIFEST_FILE, "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl"]

    cut = tmp_path / "cut"
    done = distill(cut, chat_target, prompts, dies_before="shard-00001.jsonl")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(contents(cut)) == [".shard-00001.jsonl.tmp", MANIFEST_FILE, "shard-00000.jsonl"]
    assert not Manifest.read(cut / "set").finished

    done = distill(cut, chat_target, prompts, **{"max-tokens": 13})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: set was begun with max_tokens 12, now it is 13; ")

    done = distill(cut, chat_target, prompts)
    assert done.returncode == 0, done.stderr
    assert contents(cut) == whole
    manifest = Manifest.read(cut / "set")
    assert manifest.finished
    assert manifest.counts is not None
    assert done.stdout.splitlines()[-1] == f"set: 9 records of 9 prompts, {manifest.counts.tokens} tokens, in 3 files"
    assert manifest.counts == Counts(prompts=9, records=9, tokens=manifest.counts.tokens)
