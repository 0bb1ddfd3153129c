# SPDX-License-Identifier: Apache-2.0
"""Prompts that the target writes itself (Magpie, arXiv 2406.08464).

Given only its chat template's opening of a user turn, a chat model writes what a user might ask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from vllm_medusa.data.chat import UserTurn
from vllm_medusa.distillation.dialogue import Target, derived_seed
from vllm_medusa.distillation.raw_text import OnText, TextRequest, WrittenText
from vllm_medusa.files import replaced_file

PROMPTS_DIRECTORY = "prompts"
"""Where a training set keeps the prompts that were written for it."""

LEAST_NEW = 0.05
"""The share of all texts that must be new prompts; below it the wanted number may never be reached."""

JUDGED_FROM = 100
"""Number of texts from which on their share of new prompts is judged."""


class SelfPromptConfig(BaseModel):
    """The settings with which the target writes prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    self_prompts: int = Field(
        ge=1, description="Instead of files: so many different prompts that the target writes itself."
    )
    prompt_temperature: float = Field(1.0, gt=0, lt=100, description="Of the target's own prompts.")
    prompt_top_p: float = Field(0.98, gt=0, le=1, description="Of the target's own prompts.")
    prompt_min_tokens: int = Field(4, ge=1, description="Own prompts that are shorter are left out.")
    prompt_max_tokens: int = Field(256, ge=1, description="Own prompts that are longer are left out.")


@dataclass(frozen=True)
class SelfPrompts:
    """How a target writes prompts: the settings, and the user turn of its chat template."""

    config: SelfPromptConfig
    turn: UserTurn

    def write(self, directory: Path, target: Target, seed: int, group_size: int, on_text: OnText) -> Iterator[Path]:
        """Let a running target write prompts into files that ``read_prompts`` reads, and yield one file after another.

        Texts are written in groups. Each group gives one file, written atomically, of the prompts that are new in it.
        The same call goes on after the groups that are there; if the target is deterministic, the files are those of an
        uninterrupted run. Altogether the files hold ``config.self_prompts`` different prompts.

        Args:
            directory: the directory of the files.
            target: the target, inside its ``running``.
            seed: determines the seed of each text.
            group_size: most texts of a group.
            on_text: called with each text.

        Raises:
            ValueError: the target repeats itself, or refuses a setting.
            OSError: a file cannot be read or written, or the target cannot be reached.

        """
        known: set[str] = set()
        first = group = 0
        while (missing := self.config.self_prompts - len(known)) > 0:
            file = directory / f"prompts-{group:05d}.jsonl"
            texts = min(group_size, missing + missing // 4 + 8)  # Some are no prompts, or not new.
            if not file.exists():
                requests = [self._request(seed, number) for number in range(first, first + texts)]
                new = list(self._new_prompts(target.write(requests, on_text), known))
                self._judge(len(known) + len(new), first + texts)
                _write(file, new[:missing])
            known.update(map(_key, _read(file)))
            first += texts
            group += 1
            yield file

    def _judge(self, new: int, texts: int) -> None:
        """Raise ``ValueError`` if so few of the texts are new prompts that there may never be enough."""
        if texts >= JUDGED_FROM and new < LEAST_NEW * texts:
            raise ValueError(
                f"only {new} of {texts} texts that the target wrote are new prompts, of self-prompts "
                f"{self.config.self_prompts}; give a smaller number, a higher prompt-temperature or wider limits of "
                "prompt tokens"
            )

    def _request(self, seed: int, number: int) -> TextRequest:
        return TextRequest(
            prompt_ids=self.turn.opening_ids,
            stop=self.turn.end,
            temperature=self.config.prompt_temperature,
            top_p=self.config.prompt_top_p,
            max_tokens=self.config.prompt_max_tokens + 1,  # One more for the end of the turn.
            seed=derived_seed(seed, f"prompt/{number}"),
        )

    def _new_prompts(self, texts: Sequence[WrittenText], known: set[str]) -> Iterator[WrittenText]:
        """Yield the texts that are whole prompts and differ from all others."""
        found = set(known)
        for text in texts:
            key = _key(text.text)
            special = any(token in text.text for token in self.turn.special_tokens)
            if text.ended and key and not special and text.num_tokens >= self.config.prompt_min_tokens:
                if key not in found:
                    yield text
                found.add(key)


def _key(prompt: str) -> str:
    """What two prompts have in common that differ only in case and white space."""
    return " ".join(prompt.casefold().split())


def _write(file: Path, prompts: Sequence[WrittenText]) -> None:
    with replaced_file(file) as stream:
        for prompt in prompts:
            line = {"prompt": prompt.text.strip(), "num_tokens": prompt.num_tokens}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line)["prompt"] for line in stream]
