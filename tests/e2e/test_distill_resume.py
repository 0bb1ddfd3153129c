# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa distill`` that is killed and started again writes what it would have written in one go."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.e2e.forked import Done, run, run_command
from tests.integration.distillation import DIALOGUE, HEADER_TEMPLATE, read_back, write_chat_target, write_lines
from vllm_medusa.distillation.manifest import MANIFEST_FILE, Counts, Manifest

ENGINE_ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
}
LONG = "x" * 150
"""Makes a prompt so long that not all of them fit into the first step."""


def run_or_die(name: str, *arguments: str) -> None:
    """Run the command; it is killed when a file of that name is written and about to get its place."""
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    run_command(*arguments)


def distill(directory: Path, target: Path, *prompts: Path, dies_before: str = "", **settings: int) -> Done:
    """Run the command in a directory of its own, so that two runs have the same arguments."""
    options = {"max-tokens": 12, "shard-size": 3, **settings, "engine-args": json.dumps(ENGINE_ARGS)}
    flags = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    arguments = ["distill", *map(str, prompts), "--output", "set", "--model", str(target), *flags]
    temperatures = ["--temperature", "0", "--temperature", "0.9"]
    return run(run_or_die, dies_before, *arguments, *temperatures, directory=directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "set").rglob("*") if path.is_file()}


def test_a_run_that_is_killed_ends_with_the_files_of_one_that_is_not(tiny_target: Path, tmp_path: Path) -> None:
    target = write_chat_target(tiny_target, tmp_path / "target")
    prompts = write_lines(
        tmp_path / "prompts.jsonl", DIALOGUE, *({"prompt": f"def f{index}({LONG}):"} for index in range(8))
    )
    done = distill(tmp_path / "whole", target, prompts)
    assert done.code == 0, done.stderr
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [MANIFEST_FILE, "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl"]

    cut = tmp_path / "cut"
    done = distill(cut, target, prompts, dies_before="shard-00001.jsonl")
    assert done.code == -signal.SIGKILL, done.stderr
    assert sorted(contents(cut)) == [".shard-00001.jsonl.tmp", MANIFEST_FILE, "shard-00000.jsonl"]
    assert not Manifest.read(cut / "set").finished

    done = distill(cut, target, prompts, **{"max-tokens": 13})
    assert done.code == 2
    assert done.stderr.splitlines()[-1].startswith("Error: set was begun with max_tokens 12, now it is 13; ")

    done = distill(cut, target, prompts)
    assert done.code == 0, done.stderr
    assert contents(cut) == whole
    manifest = Manifest.read(cut / "set")
    assert manifest.finished
    assert manifest.counts is not None
    assert done.stdout.splitlines()[-1] == f"set: 9 records of 9 prompts, {manifest.counts.tokens} tokens, in 3 files"
    assert manifest.counts == Counts(prompts=9, records=9, tokens=manifest.counts.tokens)


def test_so_does_a_run_that_writes_its_own_prompts(tiny_target: Path, tmp_path: Path) -> None:
    target = write_chat_target(tiny_target, tmp_path / "target", HEADER_TEMPLATE)
    own = {"self-prompts": 5, "prompt-max-tokens": 24, "prompt-min-tokens": 2}
    done = distill(tmp_path / "whole", target, **own)
    assert done.code == 0, done.stderr
    whole = contents(tmp_path / "whole")
    assert {MANIFEST_FILE, "prompts-00000.jsonl", "shard-00000.jsonl", "shard-00001.jsonl"} <= set(whole)

    for file in ("prompts-00001.jsonl", "shard-00001.jsonl"):
        done = distill(tmp_path / "cut", target, dies_before=file, **own)
        assert done.code == -signal.SIGKILL, done.stderr
    done = distill(tmp_path / "cut", target, **own)
    assert done.code == 0, done.stderr
    written = contents(tmp_path / "cut")
    assert {name: written[name] for name in whole} == whole
    prompts = [message.content for record in read_back(tmp_path / "cut" / "set") for message in record.messages[:1]]
    assert len(set(prompts)) == len(prompts) == 5
    assert not any(":" in prompt for prompt in prompts)
