# SPDX-License-Identifier: Apache-2.0
"""The records of a training set: texts, completions of prompts, and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_medusa.data.validation import validated
from vllm_medusa.messages import shortened


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


SHAREGPT_ROLES = {"human": Role.USER, "gpt": Role.ASSISTANT}
"""ShareGPT's names for roles that OpenAI calls otherwise."""


def _openai_role(name: Any) -> Any:
    return SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name


class FrozenModel(BaseModel):
    """Part of a record. Unknown keys are ignored, since published sets have additional ones (an id, a language)."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Message(FrozenModel):
    """One message of a conversation, with OpenAI's or ShareGPT's keys."""

    role: Annotated[Role, BeforeValidator(_openai_role), Field(validation_alias=AliasChoices("role", "from"))]
    content: Annotated[str, Field(validation_alias=AliasChoices("content", "value"))]


class TurnTokens(FrozenModel):
    """The token ids of one answer.

    Attributes:
        prompt_ids: the target's whole prompt, including earlier turns.
        completion_ids: the tokens that the target emitted, with the end-of-sequence token if there was one.

    """

    prompt_ids: tuple[Annotated[int, Field(ge=0)], ...]
    completion_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)


class Text(FrozenModel):
    """A document; loss is taken on all of it."""

    text: str = Field(min_length=1)


class Completion(FrozenModel):
    """A prompt and its continuation; loss is taken on the continuation.

    Attributes:
        prompt: the prompt.
        completion: the continuation, with the space between the two if there is one.
        tokens: the token ids, if known.

    """

    prompt: str
    completion: str = Field(min_length=1)
    tokens: tuple[TurnTokens, ...] = Field(default=(), max_length=1)


class Conversation(FrozenModel):
    """Messages; loss is taken on the assistant's.

    Attributes:
        messages: in order; at least one is the assistant's.
        tokens: the token ids of each answer, if known.

    """

    messages: Annotated[tuple[Message, ...], Field(validation_alias=AliasChoices("messages", "conversations"))]
    tokens: tuple[TurnTokens, ...] = ()

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        refuse_empty_turns(self.messages, Role.USER, Role.ASSISTANT)
        answers = sum(message.role is Role.ASSISTANT for message in self.messages)
        if answers == 0:
            raise ValueError("no turn is the assistant's, so there is nothing to learn")
        if len(self.tokens) not in (0, answers):
            raise ValueError(f"there are tokens of {len(self.tokens)} turns, but the assistant has {answers} turns")
        return self


def refuse_empty_turns(messages: Sequence[Message], *roles: Role) -> None:
    """Raise ``ValueError`` if a message of one of these roles is empty."""
    for number, message in enumerate(messages, start=1):
        if message.role in roles and not message.content.strip():
            raise ValueError(f"message {number} (counted from 1), the {message.role}'s, is empty")


Record = Text | Completion | Conversation

MESSAGE_KEYS = ("messages", "conversations")
"""OpenAI's and ShareGPT's keys for a conversation."""


def parse_record(value: Any) -> Record:
    """Parse the JSON value of one line.

    Args:
        value: ``{"conversations": [{"from", "value"}, ...]}`` (ShareGPT), ``{"messages": [{"role", "content"}, ...]}``
            (OpenAI), ``{"prompt", "completion"}``, or ``{"text"}``; further keys are ignored.

    Raises:
        ValueError: the value is none of these; the message is one line.

    """
    fields = as_object(value)
    kind: type[Record]
    if any(key in fields for key in MESSAGE_KEYS):
        kind = Conversation
    elif "prompt" in fields and "completion" in fields:
        kind = Completion
    elif "text" in fields:
        kind = Text
    else:
        raise ValueError(
            f"holds {shown_keys(fields)}; give 'messages', 'conversations', 'prompt' and 'completion', or 'text'"
        )
    return validated(kind, fields)


def shown_keys(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "no keys"


def as_object(value: Any) -> Mapping[str, Any]:
    """Return ``value`` if it is a JSON object, else raise ``ValueError``."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {shortened(value)}")
    return value
