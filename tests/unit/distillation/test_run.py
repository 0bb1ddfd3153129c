# SPDX-License-Identifier: Apache-2.0
"""Self-distillation with a fake target; tests/integration/test_distill.py has real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.unit.full_disk import largest_file
from vllm_medusa.data.record_files import BadLineCounter, BadLineError, BadLines, read_records
from vllm_medusa.data.records import Conversation, Record, TurnTokens
from vllm_medusa.distillation.dialogue import Answer, Dialogue, OnAnswer, PromptStyle
from vllm_medusa.distillation.manifest import MANIFEST_FILE, Counts, Manifest
from vllm_medusa.distillation.run import DistillConfig, distill, shard_path

CONFIG = DistillConfig(model="echo", style=PromptStyle.CHAT, temperature=(0.0, 0.5, 1.0), shard_size=3)


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Echo:
    """Echoes a prompt with the turn's temperature and seed; answers "hush" with "" and refuses "x"."""

    settings: dict[str, Any] = field(default_factory=lambda: {"engine": "echo"})
    tells_tokens: bool = True
    batches: list[int] = field(default_factory=list)
    dies_in_batch: int | None = None
    starts: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        self.starts += 1
        yield

    def converse(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        self.batches.append(len(dialogues))
        if len(self.batches) == self.dies_in_batch:
            raise Killed
        for dialogue in dialogues:
            while dialogue.is_open:
                said, sampling = dialogue.messages[-1].content, dialogue.turn_sampling
                if said == "x":
                    dialogue.refuse("too long")
                    continue
                text = "" if said == "hush" else f"{said} {sampling.temperature} {sampling.seed}"
                ids = TurnTokens(prompt_ids=(len(dialogue.messages),), completion_ids=(1, 2))
                answer = Answer(text, 2, ids if self.tells_tokens else None)
                dialogue.add_answer(answer)
                on_answer(dialogue, answer)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(8)))
    return path


def run(
    files: Sequence[Path],
    output: Path,
    config: DistillConfig = CONFIG,
    target: Echo | None = None,
    bad_lines: BadLines = BadLines.REFUSE,
) -> Manifest:
    return distill(files, output, config, target or Echo(), BadLineCounter(bad_lines), ["distill"], show_progress=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def records(directory: Path) -> list[Record]:
    return [record for _, record in read_records([directory], BadLineCounter(BadLines.REFUSE))]


def test_a_set_is_written_in_shards_with_a_manifest(prompts: Path, tmp_path: Path):
    target = Echo()
    manifest = run([prompts], tmp_path / "set", target=target)
    assert target.batches == [3, 3, 2]
    assert manifest == Manifest.read(tmp_path / "set")
    assert manifest.finished
    assert manifest.counts == Counts(prompts=8, records=8, tokens=16)
    assert sorted(contents(tmp_path / "set")) == [MANIFEST_FILE, *(f"shard-0000{shard}.jsonl" for shard in range(3))]
    assert list(manifest.shards) == sorted(manifest.shards)
    conversations = [record for record in records(tmp_path / "set") if isinstance(record, Conversation)]
    assert [record.messages[0].content for record in conversations] == [f"prompt {number}" for number in range(8)]
    line = json.loads(shard_path(tmp_path / "set", 1).read_text().splitlines()[0])
    assert (line["source"], line["num_tokens"]) == ("prompts.txt:4", 2)
    assert line["messages"][1]["content"].split()[2] == str(line["temperature"])


def test_a_set_may_itself_be_prompts(prompts: Path, tmp_path: Path):
    run([prompts], tmp_path / "first")
    manifest = run([tmp_path / "first"], tmp_path / "second")
    assert [name for name, _ in manifest.inputs] == ["shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl"]
    firsts, seconds = records(tmp_path / "first"), records(tmp_path / "second")
    assert firsts == seconds


def test_a_server_that_tells_no_tokens_leaves_the_text(prompts: Path, tmp_path: Path):
    run([prompts], tmp_path / "set", target=Echo(tells_tokens=False))
    assert all(record.tokens == () for record in records(tmp_path / "set") if isinstance(record, Conversation))
    assert "tokens" not in json.loads(shard_path(tmp_path / "set", 0).read_text().splitlines()[0])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_run_that_was_killed_goes_on_and_ends_alike(prompts: Path, tmp_path: Path, batch: int):
    run([prompts], tmp_path / "whole")
    with pytest.raises(Killed):
        run([prompts], tmp_path / "set", target=Echo(dies_in_batch=batch))
    assert not Manifest.read(tmp_path / "set").finished
    target = Echo()
    run([prompts], tmp_path / "set", target=target)
    assert target.batches == [3, 3, 2][batch - 1 :]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_finished_set_starts_no_target(prompts: Path, tmp_path: Path):
    first = run([prompts], tmp_path / "set")
    target = Echo()
    assert run([prompts], tmp_path / "set", target=target) == first
    (tmp_path / "set" / MANIFEST_FILE).write_text(
        first.model_copy(update={"finished": False, "counts": None, "shards": {}}).model_dump_json()
    )
    assert run([prompts], tmp_path / "set", target=target) == first
    assert (target.starts, target.batches) == (0, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_tokens": 64}, "begun with max_tokens 1024, now it is 64; give the former max_tokens, or another dir"),
        ({"temperature": (0.0,)}, r"begun with temperature \[0.0, 0.5, 1.0\], now it is \[0.0\]"),
        ({"seed": 1}, "begun with seed 0, now it is 1"),
        ({"style": PromptStyle.COMPLETION}, 'begun with style "chat", now it is "completion"'),
    ],
)
def test_other_settings_are_refused_by_name(prompts: Path, tmp_path: Path, change: dict[str, Any], reason: str):
    run([prompts], tmp_path / "set")
    with pytest.raises(ValueError, match=reason):
        run([prompts], tmp_path / "set", CONFIG.model_copy(update=change))


def test_another_target_is_refused_by_name(prompts: Path, tmp_path: Path):
    run([prompts], tmp_path / "set")
    with pytest.raises(ValueError, match='begun with engine "echo", now it is null'):
        run([prompts], tmp_path / "set", target=Echo(settings={}))


def test_prompts_that_have_changed_are_refused(prompts: Path, tmp_path: Path):
    run([prompts], tmp_path / "set")
    prompts.write_text("another\n")
    with pytest.raises(
        ValueError, match=r"begun with the input files prompts\.txt \(\w{12}\) .*, now they are prompts\.txt"
    ):
        run([prompts], tmp_path / "set")


def test_a_directory_of_something_else_is_left_alone(prompts: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=f"{tmp_path} holds files but no manifest.json; give an empty or a new directory"
    ):
        run([prompts], tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / MANIFEST_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is no manifest of a training set"):
        run([prompts], tmp_path / "set")


def test_bad_lines_are_refused_before_the_target_starts(prompts: Path, tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    target = Echo()
    with pytest.raises(BadLineError, match=f"{bad}:2: "):
        run([prompts, bad], tmp_path / "set", target=target)
    assert target.starts == 0
    assert not (tmp_path / "set").exists()
    manifest = run([prompts, bad], tmp_path / "set", bad_lines=BadLines.SKIP)
    assert manifest.counts == Counts(prompts=9, records=9, tokens=18)
    bad.write_text("{}\n")
    with pytest.raises(ValueError, match=f"no prompts in {bad}: {bad}:1: holds no keys"):
        run([bad], tmp_path / "other", bad_lines=BadLines.SKIP)


def test_prompts_without_a_record_are_told_by_the_counts(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nhush\nb\nx\n")
    with pytest.raises(BadLineError, match=f"{file}:4: too long"):
        run([file], tmp_path / "set")
    counter = BadLineCounter(BadLines.SKIP)
    manifest = distill([file], tmp_path / "set", CONFIG, Echo(), counter, ["distill"], show_progress=False)
    assert manifest.counts == Counts(prompts=4, records=2, tokens=4)
    assert (counter.count, counter.first) == (1, f"{file}:4: too long")
    assert len(records(tmp_path / "set")) == 2


def test_a_full_disk_ends_the_run_with_nothing_half_written(prompts: Path, tmp_path: Path):
    whole = run([prompts], tmp_path / "whole")
    long = CONFIG.model_copy(update={"shard_size": 8})
    reason = r"shard-00000\.jsonl cannot be written \(File too large\); make room .*, then run the same command again"
    with largest_file(1024), pytest.raises(OSError, match=reason):
        run([prompts], tmp_path / "set", long)
    assert list(contents(tmp_path / "set")) == [MANIFEST_FILE]
    run([prompts], tmp_path / "set", long)
    assert [*records(tmp_path / "set")] == [*records(tmp_path / "whole")]
    assert whole.counts == Manifest.read(tmp_path / "set").counts


@pytest.mark.parametrize(
    "wrong", [{"temperature": [-0.1]}, {"temperature": []}, {"temperature": ["nan"]}, {"max_tokens": 0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillConfig.model_validate({"model": "m", **wrong})
