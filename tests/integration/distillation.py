# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of self-distillation: a chat template, prompts, and a target on an open engine."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from vllm import LLM

from vllm_medusa.data.record_files import BadLineCounter, BadLines, read_records
from vllm_medusa.data.records import Record
from vllm_medusa.distillation.offline_target import OfflineTarget

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}# {{ message['role'] }}{{ '\n' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}# assistant{{ '\n' }}{% endif %}"
)
HEADER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "def {{ message['content'] }}:{{ '\n' }}{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A user's turn is a function's name and parameters, which a target that writes Python can write too."""
DIALOGUE = {
    "conversations": [
        {"from": "system", "value": "Python."},
        {"from": "human", "value": "def add(x, y):"},
        {"from": "gpt", "value": "not the target's"},
        {"from": "human", "value": "class Point:"},
    ]
}


class SharedEngineTarget(OfflineTarget):
    """Runs on an engine that stays open; ``running`` itself is tested by tests/e2e/test_distill_resume.py."""

    def __init__(self, llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__("tiny", tokenizer, {})
        self._llm = llm

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()


def write_chat_target(target: Path, directory: Path, chat_template: str = CHAT_TEMPLATE) -> Path:
    """Give a target a chat template, in a directory of its own."""
    directory.mkdir()
    for file in target.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(chat_template)
    return directory


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def read_back(directory: Path) -> list[Record]:
    return [record for _, record in read_records([directory], BadLineCounter(BadLines.REFUSE))]
