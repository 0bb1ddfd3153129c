"""The prompts from which a target writes its own training set: of any conversation, what the users say."""

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
)
from vllm_medusa.data.validation import validated

PROMPT_KEYS = ("prompt", "text")
"""Where a prompt that is no conversation may stand."""


class Prompt(FrozenModel):
    """Messages of which the user's are to be answered; an assistant's answers, if there are any, count for nothing."""

    messages: Annotated[tuple[Message, ...], Field(validation_alias=AliasChoices(*MESSAGE_KEYS))]

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        refuse_empty_turns(self.messages, Role.USER)
        if not any(message.role is Role.USER for message in self.messages):
            raise ValueError("no turn is the user's, so there is nothing to answer")
        return self

    @property
    def prompts(self) -> tuple[Message, ...]:
        """The system's and the user's messages."""
        return tuple(message for message in self.messages if message.role is not Role.ASSISTANT)

    @property
    def first_user_message(self) -> Message:
        """What the user says first."""
        return next(message for message in self.messages if message.role is Role.USER)


def parse_prompt(value: Any) -> Prompt:
    """Make a seed of what a line of a file holds.

    Args:
        value: a conversation in ShareGPT's or OpenAI's form, ``{"prompt"}`` or ``{"text"}``.

    Raises:
        ValueError: it is none of these; one line.

    """
    fields = as_object(value)
    if any(key in fields for key in MESSAGE_KEYS):
        return validated(Prompt, fields)
    for key in PROMPT_KEYS:
        if key in fields:
            return validated(Prompt, {"messages": [{"role": Role.USER, "content": fields[key]}]})
    keys = ", ".join(map(repr, fields)) or "no keys"
    raise ValueError(f"holds {keys}; give 'messages', 'conversations', 'prompt' or 'text'")


def read_prompts(files: Sequence[Path], bad_lines: BadLineCounter) -> Iterator[tuple[Source, Prompt]]:
    """Read prompts, one after another; see ``parsed_lines`` for the files: of plain text, each line is a prompt."""
    return parsed_lines(files, parse_prompt, bad_lines)
