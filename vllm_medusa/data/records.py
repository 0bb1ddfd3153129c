"""What a training set is made of: texts, completions of prompts, conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_medusa.data.validation import shortened, validated


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


SHAREGPT_ROLES = {"human": Role.USER, "gpt": Role.ASSISTANT}
"""ShareGPT's names of the roles, where they differ from OpenAI's."""


def _openai_role(name: Any) -> Any:
    return SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name


class FrozenModel(BaseModel):
    """A part of a record. Published sets carry keys of their own (an id, a language); they are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Message(FrozenModel):
    """One turn of a conversation, in OpenAI's form or ShareGPT's."""

    role: Annotated[Role, BeforeValidator(_openai_role), Field(validation_alias=AliasChoices("role", "from"))]
    content: Annotated[str, Field(validation_alias=AliasChoices("content", "value"))]


class TurnTokens(FrozenModel):
    """The very tokens of an assistant's turn.

    Attributes:
        prompt_ids: all that the target was given, the former turns included.
        completion_ids: what the target emitted, with the end-of-sequence token if it came to that.

    """

    prompt_ids: tuple[Annotated[int, Field(ge=0)], ...]
    completion_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)


class Text(FrozenModel):
    """A document: all of it is learnt."""

    text: str = Field(min_length=1)


class Completion(FrozenModel):
    """A prompt, and its continuation, which alone is learnt.

    Attributes:
        prompt: the prompt.
        completion: the continuation, as it follows the prompt, with the space between them if there is one.
        tokens: the one turn's tokens, where they are known; empty otherwise.

    """

    prompt: str
    completion: str = Field(min_length=1)
    tokens: tuple[TurnTokens, ...] = Field(default=(), max_length=1)


class Conversation(FrozenModel):
    """Messages, of which the assistant's are learnt.

    Attributes:
        messages: the turns in order; at least one is the assistant's.
        tokens: the tokens of each of the assistant's turns, where they are known; empty otherwise.

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
            raise ValueError(f"there are tokens of {len(self.tokens)} turns, but the assistant has {answers}")
        return self


def refuse_empty_turns(messages: Sequence[Message], *roles: Role) -> None:
    """Check that everybody of these roles says something whenever he speaks.

    Raises:
        ValueError: somebody does not.

    """
    for number, message in enumerate(messages, start=1):
        if message.role in roles and not message.content.strip():
            raise ValueError(f"message {number} (counted from 1), the {message.role}'s, is empty")


Record = Text | Completion | Conversation

MESSAGE_KEYS = ("messages", "conversations")
"""Where OpenAI's form and ShareGPT's keep a conversation."""


def parse_record(value: Any) -> Record:
    """Make a record of what a line of a file holds.

    Args:
        value: ``{"conversations": [{"from", "value"}, ...]}`` (ShareGPT), ``{"messages": [{"role", "content"}, ...]}``
            (OpenAI), ``{"prompt", "completion"}``, or ``{"text"}``; further keys are passed over.

    Raises:
        ValueError: it is none of these; one line.

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
        keys = ", ".join(map(repr, fields)) or "no keys"
        raise ValueError(f"holds {keys}; give 'messages', 'conversations', 'prompt' and 'completion', or 'text'")
    return validated(kind, fields)


def as_object(value: Any) -> Mapping[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: it is something else.

    """
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {shortened(value)}")
    return value
