"""Self-distillation (paper, section 2.3.2): a target's own answers to prompts, as the training set of its heads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_medusa.data.prompts import Prompt, read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines, Source, without_directories
from vllm_medusa.distillation.dialogue import Dialogue, PromptStyle, Sampling, Target
from vllm_medusa.distillation.manifest import Counts, Manifest, sha256_of
from vllm_medusa.distillation.progress import generation_progress
from vllm_medusa.files import replaced_file


class DistillConfig(BaseModel):
    """The settings of a self-distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="The target: a directory or a repository; with --url, its name at the server.")
    style: PromptStyle | None = Field(
        None, description="Answer prompts in the chat template, or continue them; if not given: chat if there is one."
    )
    temperature: tuple[float, ...] = Field(
        (0.0, 0.7), min_length=1, description="May be repeated: each prompt gets one of them."
    )
    max_tokens: int = Field(1024, ge=1, description="Tokens of an answer at most.")
    shard_size: int = Field(1000, ge=1, description="Prompts per file, which are generated together.")
    seed: int = Field(0, ge=0, description="What temperatures and random numbers follow from.")

    @field_validator("temperature")
    @classmethod
    def _not_negative(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= temperature < math.inf for temperature in temperatures):
            raise ValueError("each must be at least 0")
        return temperatures

    @property
    def sampling(self) -> Sampling:
        """How the target chooses tokens."""
        return Sampling(self.temperature, self.max_tokens, self.seed)


def distill(
    files: Sequence[Path],
    output: Path,
    config: DistillConfig,
    target: Target,
    bad_lines: BadLineCounter,
    command: Sequence[str] = (),
    show_progress: bool = True,
) -> Manifest:
    """Let a target answer prompts, and write what was said as records that ``load_blocks`` reads.

    The prompts' conversations keep the user's turns; the target's answers take the assistant's place. Each
    ``shard_size`` prompts become a file ``shard-00000.jsonl``, which is there whole or not at all. A run that was
    interrupted goes on after its finished shards when it is called again with the same arguments. Unless the target
    itself varies, it ends with the very files that it would have written without the interruption.

    Args:
        files: prompts; what ``read_prompts`` takes.
        output: the directory; new, empty, or of a run that was interrupted.
        config: the settings; the style is chat if it is None.
        target: the model.
        bad_lines: what happens to lines without a prompt, and to prompts that the target does not take.
        command: noted in the manifest.
        show_progress: whether to draw a progress bar.

    Returns:
        The manifest of the finished set.

    Raises:
        ValueError: a line is no good and bad lines are refused, no line is good, the directory belongs to another run,
            or the target refuses a setting.
        OSError: a file cannot be read or written, or the target cannot be reached.

    """
    files = without_directories(files)
    prompts = sum(1 for _ in read_prompts(files, bad_lines))  # All lines are checked before a model is loaded.
    if prompts == 0:
        reason = f": {bad_lines.first}" if bad_lines.first else ""
        raise ValueError(f"no prompts in {', '.join(map(str, files)) or 'no files'}{reason}")
    settings = {**config.model_dump(mode="json"), **target.settings}
    manifest = Manifest.of_run(settings, files, command).begin_in(output)
    if manifest.finished:
        return manifest
    shards = [shard_path(output, number) for number in range(math.ceil(prompts / config.shard_size))]
    engine = nullcontext() if all(shard.exists() for shard in shards) else target.running()
    with engine, generation_progress("Prompts", prompts, show_progress) as progress:
        for shard, (first, group) in zip(shards, _groups(files, config.shard_size), strict=True):
            if not shard.exists():
                dialogues = [
                    Dialogue(source, number, seed, config.style or PromptStyle.CHAT, config.sampling, bad_lines)
                    for number, (source, seed) in enumerate(group, start=first)
                ]
                target.converse(dialogues, progress.answered)
                _write(shard, dialogues)
            progress.reach(first + len(group))
    finished = manifest.model_copy(
        update={
            "finished": True,
            "counts": _counts(prompts, shards),
            "shards": {shard.name: sha256_of(shard) for shard in shards},
        }
    )
    finished.write(output)
    return finished


def shard_path(directory: Path, number: int) -> Path:
    """Return where a shard, counted from 0, stands once it is finished."""
    return directory / f"shard-{number:05d}.jsonl"


def _groups(files: Sequence[Path], size: int) -> Iterator[tuple[int, list[tuple[Source, Prompt]]]]:
    """Yield the seeds in groups, each with its first seed's number; bad lines were dealt with before."""
    seeds = read_prompts(files, BadLineCounter(BadLines.SKIP))
    first = 0
    while group := list(islice(seeds, size)):
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


def _counts(prompts: int, shards: Sequence[Path]) -> Counts:
    records = tokens = 0
    for shard in shards:
        with shard.open(encoding="utf-8") as stream:
            for line in stream:
                records += 1
                tokens += json.loads(line)["num_tokens"]
    return Counts(prompts=prompts, records=records, tokens=tokens)
