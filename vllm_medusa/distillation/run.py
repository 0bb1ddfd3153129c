# SPDX-License-Identifier: Apache-2.0
"""Self-distillation (paper, section 2.3.2): the target's answers to prompts become the training set for its heads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_medusa.data.prompts import Prompt, read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines, Source, without_directories
from vllm_medusa.distillation.dialogue import Answer, Dialogue, PromptStyle, Sampling, Target
from vllm_medusa.distillation.manifest import Counts, Manifest
from vllm_medusa.distillation.raw_text import WrittenText
from vllm_medusa.distillation.self_prompts import PROMPTS_DIRECTORY, SelfPrompts
from vllm_medusa.files import replaced_file, sha256_of
from vllm_medusa.progress import progress


class DistillConfig(BaseModel):
    """The settings of a self-distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="The target: a directory or a repository; with --url, its name at the server.")
    style: PromptStyle | None = Field(
        None, description="Answer prompts in the chat template, or continue them. Default: chat if there is a template."
    )
    temperature: tuple[float, ...] = Field(
        (0.0, 0.7), min_length=1, description="May be repeated: each prompt gets one of them."
    )
    max_tokens: int = Field(1024, ge=1, description="Most tokens per answer.")
    shard_size: int = Field(1000, ge=1, description="Prompts per output file; they are answered together.")
    seed: int = Field(0, ge=0, description="Random seed of temperatures and sampling.")

    @field_validator("temperature")
    @classmethod
    def _not_negative(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= temperature < math.inf for temperature in temperatures):
            raise ValueError("each must be at least 0")
        return temperatures

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.max_tokens, self.seed)


def distill(
    files: Sequence[Path],
    output: Path,
    config: DistillConfig,
    target: Target,
    bad_lines: BadLineCounter,
    command: Sequence[str] = (),
    show_progress: bool = True,
    self_prompts: SelfPrompts | None = None,
) -> Manifest:
    """Let a target answer prompts, and write records that ``load_blocks`` reads.

    Of conversations, the user's messages are kept and the target answers them anew. Each ``shard_size`` prompts give
    one file, ``shard-00000.jsonl`` and so on, written atomically. The same call resumes an interrupted run after its
    finished shards. If the target is deterministic, the files are those of an uninterrupted run.

    Args:
        files: prompts, as ``read_prompts`` reads them; none with ``self_prompts``.
        output: a directory that is new, empty, or of an interrupted run.
        config: the settings; the default style is chat.
        target: the model.
        bad_lines: refuses or counts lines without a prompt, and prompts that the target refuses.
        command: kept in the manifest.
        show_progress: whether to show progress.
        self_prompts: lets the target write the prompts too, into files in ``output / "prompts"``, as they are needed.

    Returns:
        The manifest of the finished set.

    Raises:
        ValueError: a line is bad and bad lines are refused, all lines are bad, the directory belongs to another run,
            or the target refuses a setting.
        OSError: a file cannot be read or written, or the target cannot be reached.

    """
    settings = {**config.model_dump(mode="json"), **target.settings}
    if self_prompts is None:
        files = without_directories(files)
        num_prompts = _count_prompts(files, bad_lines)  # Checks all lines before the model is loaded.
    else:
        num_prompts = self_prompts.config.self_prompts
        settings |= self_prompts.config.model_dump(mode="json")
    manifest = Manifest.of_run(settings, files, command).begin_in(output)
    if manifest.finished:
        return manifest
    shards = [shard_path(output, number) for number in range(math.ceil(num_prompts / config.shard_size))]
    engine = nullcontext() if all(shard.exists() for shard in shards) else target.running()
    with engine, progress("Prompts", num_prompts, show_progress) as shown:

        def answered(dialogue: Dialogue, answer: Answer) -> None:
            shown.advance(steps=0 if dialogue.is_open else 1, tokens=answer.num_tokens)

        def wrote(text: WrittenText) -> None:
            shown.advance(steps=0, tokens=text.num_tokens)

        sources: Iterable[Path] = files
        if self_prompts is not None:
            directory = output / PROMPTS_DIRECTORY
            sources = self_prompts.write(directory, target, config.seed, config.shard_size, wrote)
        for shard, (first, group) in zip(shards, _groups(sources, config.shard_size), strict=True):
            if not shard.exists():
                dialogues = [
                    Dialogue(source, number, prompt, config.style or PromptStyle.CHAT, config.sampling, bad_lines)
                    for number, (source, prompt) in enumerate(group, start=first)
                ]
                target.converse(dialogues, answered)
                _write(shard, dialogues)
            shown.skip_to(first + len(group))  # Past those of an earlier run, and those without an answer.
    finished = manifest.model_copy(
        update={
            "finished": True,
            "counts": _counts(num_prompts, shards),
            "shards": {shard.name: sha256_of(shard) for shard in shards},
        }
    )
    finished.write(output)
    return finished


def _count_prompts(files: Sequence[Path], bad_lines: BadLineCounter) -> int:
    num_prompts = sum(1 for _ in read_prompts(files, bad_lines))
    if num_prompts == 0:
        reason = f": {bad_lines.first}" if bad_lines.first else ""
        raise ValueError(f"no prompts in {', '.join(map(str, files)) or 'no files'}{reason}")
    return num_prompts


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.jsonl"


def _groups(files: Iterable[Path], size: int) -> Iterator[tuple[int, list[tuple[Source, Prompt]]]]:
    """Yield groups of ``size`` prompts and the number of each group's first prompt."""
    counted = BadLineCounter(BadLines.SKIP)  # The caller has refused or counted bad lines.
    prompts = chain.from_iterable(read_prompts([file], counted) for file in files)
    first = 0
    while group := list(islice(prompts, size)):
        yield first, group
        first += len(group)


def _write(shard: Path, dialogues: Sequence[Dialogue]) -> None:
    with replaced_file(shard) as stream:
        for dialogue in dialogues:
            if (record := dialogue.record()) is not None:
                line = record.model_dump(mode="json", exclude_defaults=True) | {
                    "source": f"{dialogue.source.file.name}:{dialogue.source.line}",
                    "temperature": dialogue.turn_sampling.temperature,
                    "num_tokens": dialogue.num_tokens,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _counts(num_prompts: int, shards: Sequence[Path]) -> Counts:
    records = tokens = 0
    for shard in shards:
        with shard.open(encoding="utf-8") as stream:
            for line in stream:
                records += 1
                tokens += json.loads(line)["num_tokens"]
    return Counts(prompts=num_prompts, records=records, tokens=tokens)
