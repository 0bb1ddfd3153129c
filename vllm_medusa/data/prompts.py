# SPDX-License-Identifier: Apache-2.0
"""The prompts to which a target writes its own training set: single prompts, or the user's turns of conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, Field, model_validator

from vllm_medusa.data.record_files import BadLineCounter, Source, parsed_lines
from vllm_medusa.data.records import (
    MESSAGE_KEYS,
    FrozenModel,
    Message,
    Role,
    as_object,
    refuse_empty_turns,
    shown_keys,
)
from vllm_medusa.data.validation import validated

PROMPT_KEYS = ("prompt", "text")
"""Keys for a single prompt."""


class Prompt(FrozenModel):
    """Messages of which the target answers the user's; answers that are already there are replaced."""

    messages: Annotated[tuple[Message, ...], Field(validation_alias=AliasChoices(*MESSAGE_KEYS))]

    @model_validator(mode="after")
    def _has_questions(self) -> Self:
        refuse_empty_turns(self.messages, Role.USER)
        if not any(message.role is Role.USER for message in self.messages):
            raise ValueError("no turn is the user's, so there is nothing to answer")
        return self

    @property
    def without_answers(self) -> tuple[Message, ...]:
        return tuple(message for message in self.messages if message.role is not Role.ASSISTANT)

    @property
    def first_user_message(self) -> Message:
        return next(message for message in self.messages if message.role is Role.USER)


def parse_prompt(value: Any) -> Prompt:
    """Parse the JSON value of one line.

    Args:
        value: a conversation in ShareGPT's or OpenAI's form, ``{"prompt"}`` or ``{"text"}``.

    Raises:
        ValueError: the value is none of these; the message is one line.

    """
    fields = as_object(value)
    if any(key in fields for key in MESSAGE_KEYS):
        return validated(Prompt, fields)
    for key in PROMPT_KEYS:
        if key in fields:
            return validated(Prompt, {"messages": [{"role": Role.USER, "content": fields[key]}]})
    raise ValueError(f"holds {shown_keys(fields)}; give 'messages', 'conversations', 'prompt' or 'text'")


def read_prompts(files: Sequence[Path], bad_lines: BadLineCounter) -> Iterator[tuple[Source, Prompt]]:
    """Read prompts one by one: ``parse_prompt`` for each of the ``parsed_lines``."""
    return parsed_lines(files, parse_prompt, bad_lines)
