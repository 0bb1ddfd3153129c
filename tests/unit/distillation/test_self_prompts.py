# SPDX-License-Identifier: Apache-2.0
"""Prompts that a fake target writes; tests/integration/test_distill.py has a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.unit.distillation.test_run import CONFIG, Echo, Killed, contents, records
from vllm_medusa.data.chat import UserTurn
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.data.records import Conversation
from vllm_medusa.distillation.manifest import Counts, Manifest
from vllm_medusa.distillation.raw_text import OnText, TextRequest, WrittenText
from vllm_medusa.distillation.run import distill
from vllm_medusa.distillation.self_prompts import SelfPromptConfig, SelfPrompts

TURN = UserTurn(opening_ids=(1, 2), end="<|end|>", special_tokens=("<|end|>", "<|start|>"))
OTHERS = (
    WrittenText("cut", 9, ended=False),
    WrittenText(" \n", 9, ended=True),
    WrittenText("short", 3, ended=True),
    WrittenText("what?<|start|>answer", 9, ended=True),
)
"""Texts that are no prompts."""


@dataclass
class Author(Echo):
    """Writes a prompt that follows from the seed, each one twice, and between them texts that are no prompts."""

    different: int = 1 << 31
    dies_at_text: int = 1 << 31
    written: int = 0

    def __post_init__(self) -> None:
        self.requests: list[TextRequest] = []

    def write(self, requests: Sequence[TextRequest], on_text: OnText) -> list[WrittenText]:
        texts = []
        for number, request in enumerate(requests):
            self.written += 1
            if self.written == self.dies_at_text:
                raise Killed
            self.requests.append(request)
            seed = requests[number - number % 2].seed % self.different
            text = WrittenText(f"Prompt {seed}" if number % 2 else f" prompt  {seed}\n", 9, ended=True)
            texts.append(OTHERS[number // 3 % 4] if number % 3 == 0 else text)
            on_text(texts[-1])
        return texts


def run(output: Path, target: Author, prompts: int = 7, **settings: Any) -> Manifest:
    config = SelfPromptConfig(self_prompts=prompts, **settings)
    counter = BadLineCounter(BadLines.REFUSE)
    own = SelfPrompts(config, TURN)
    return distill([], output, CONFIG, target, counter, ["distill"], show_progress=False, self_prompts=own)


def prompts_in(directory: Path) -> list[str]:
    return [record.messages[0].content for record in records(directory) if isinstance(record, Conversation)]


def test_the_target_answers_different_whole_prompts_of_its_own(tmp_path: Path) -> None:
    target = Author()
    manifest = run(tmp_path / "set", target)
    assert manifest.counts == Counts(prompts=7, records=7, tokens=14)
    assert (manifest.inputs, manifest.settings["self_prompts"]) == ((), 7)
    prompts = prompts_in(tmp_path / "set")
    assert len({prompt.casefold() for prompt in prompts}) == 7
    assert all(prompt == prompt.strip() and prompt.casefold().startswith("prompt ") for prompt in prompts)


def test_texts_are_asked_for_as_the_settings_say(tmp_path: Path) -> None:
    target = Author()
    run(tmp_path / "set", target, prompt_temperature=0.9, prompt_top_p=0.5, prompt_max_tokens=20)
    assert len({request.seed for request in target.requests}) == len(target.requests)
    for request in target.requests:
        assert (request.prompt_ids, request.stop, request.max_tokens) == ((1, 2), "<|end|>", 21)
        assert (request.temperature, request.top_p) == (0.9, 0.5)
    again = Author()
    run(tmp_path / "again", again, prompt_temperature=0.9, prompt_top_p=0.5, prompt_max_tokens=20)
    assert prompts_in(tmp_path / "again") == prompts_in(tmp_path / "set")


@pytest.mark.parametrize("text", [1, 4, 9])
def test_a_run_that_was_killed_goes_on_and_ends_alike(tmp_path: Path, text: int) -> None:
    run(tmp_path / "whole", Author())
    with pytest.raises(Killed):
        run(tmp_path / "set", Author(dies_at_text=text))
    run(tmp_path / "set", Author())
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_finished_groups_are_not_written_again(tmp_path: Path) -> None:
    whole = Author()
    run(tmp_path / "whole", whole)
    with pytest.raises(Killed):
        run(tmp_path / "set", Author(dies_at_text=4))
    target = Author()
    run(tmp_path / "set", target)
    assert target.requests == whole.requests[3:]
    target = Author()
    run(tmp_path / "set", target)
    assert (target.requests, target.starts) == ([], 0)


def test_prompts_are_answered_before_more_are_written(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "set", Author(dies_at_text=12))
    assert len(records(tmp_path / "set")) == 2 * CONFIG.shard_size


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path / "set", Author())
    with pytest.raises(ValueError, match=r"begun with prompt_top_p 0\.98, now it is 0\.5"):
        run(tmp_path / "set", Author(), prompt_top_p=0.5)


def test_a_target_that_repeats_itself_is_refused(tmp_path: Path) -> None:
    reason = r"only 2 of \d{3} texts .* are new prompts, of self-prompts 7; give a smaller number, a higher"
    with pytest.raises(ValueError, match=reason):
        run(tmp_path / "set", Author(different=2))


def files(directory: Path) -> dict[str, bytes]:
    prompts = contents(directory / "prompts")
    return {path.name: path.read_bytes() for path in directory.glob("*.json*")} | prompts
