# SPDX-License-Identifier: Apache-2.0
"""Dialogues of self-distillation: the target answers each turn of the user, with its own earlier answers in context."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from vllm_medusa.data.prompts import Prompt
from vllm_medusa.data.record_files import BadLineCounter, Source
from vllm_medusa.data.records import Completion, Conversation, Message, Role, TurnTokens
from vllm_medusa.distillation.raw_text import OnText, TextRequest, WrittenText


class PromptStyle(StrEnum):
    """Answer prompts in the chat template, or continue them as plain text."""

    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True)
class TurnSampling:
    """The sampling parameters of one answer; ``seed`` has 31 bits."""

    temperature: float
    max_tokens: int
    seed: int


def derived_seed(seed: int, name: str) -> int:
    """Return a seed of 31 bits for what ``name`` names in a run of this seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of all dialogues.

    Attributes:
        temperatures: each dialogue gets one of them at random.
        max_tokens: the longest answer.
        seed: determines each dialogue's temperature and the seed of each of its answers.

    """

    temperatures: Sequence[float]
    max_tokens: int
    seed: int

    def of_turn(self, dialogue: int, turn: int) -> TurnSampling:
        """Return the parameters of one answer; dialogues and turns are counted from 0."""
        temperature = self.temperatures[derived_seed(self.seed, f"{dialogue}") % len(self.temperatures)]
        return TurnSampling(temperature, self.max_tokens, derived_seed(self.seed, f"{dialogue}/{turn}"))


@dataclass(frozen=True)
class Answer:
    """One answer of the target.

    Attributes:
        text: without special tokens.
        num_tokens: number of tokens emitted.
        tokens: the token ids; None if the server does not return them.

    """

    text: str
    num_tokens: int
    tokens: TurnTokens | None


class Dialogue:
    """Asks the target the user's messages one after another.

    A dialogue ends when all messages are answered, when an answer is empty, or when the target refuses the messages.
    The record leaves out a message without an answer.

    Args:
        source: where the prompt was read.
        number: the dialogue's number, counted from 0.
        prompt: the messages; with ``PromptStyle.COMPLETION`` only the user's first is used.
        style: how the target is asked.
        sampling: the sampling parameters.
        bad_lines: is told if the target refuses the first message.

    Attributes:
        messages: the messages so far; the target answers the last one.
        is_open: whether a message waits for an answer.

    """

    def __init__(
        self,
        source: Source,
        number: int,
        prompt: Prompt,
        style: PromptStyle,
        sampling: Sampling,
        bad_lines: BadLineCounter,
    ) -> None:
        self.source = source
        self.style = style
        self.messages: list[Message] = []
        self.is_open = True
        self._bad_lines = bad_lines
        self._number = number
        self._sampling = sampling
        self._pending = deque(prompt.without_answers if style is PromptStyle.CHAT else [prompt.first_user_message])
        self._answers: list[Answer] = []
        self._ask_next()

    @property
    def turn_sampling(self) -> TurnSampling:
        """The sampling parameters of the next answer."""
        return self._sampling.of_turn(self._number, len(self._answers))

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self._answers)

    def add_answer(self, answer: Answer) -> None:
        """Record an answer and go on to the user's next message."""
        if not answer.text.strip():
            self.is_open = False
            return
        self._answers.append(answer)
        self.messages.append(Message(role=Role.ASSISTANT, content=answer.text))
        self._ask_next()

    def refuse(self, reason: str) -> None:
        """End the dialogue, for example because its messages are too long; without any answer it is a bad line."""
        self.is_open = False
        if not self._answers:
            self._bad_lines.add(self.source, reason)

    def record(self) -> Conversation | Completion | None:
        """Return the dialogue, with token ids if all are known; None if there was no answer."""
        if not self._answers:
            return None
        known = [answer.tokens for answer in self._answers if answer.tokens is not None]
        tokens = tuple(known) if len(known) == len(self._answers) else ()
        if self.style is PromptStyle.COMPLETION:
            return Completion(prompt=self.messages[0].content, completion=self._answers[0].text, tokens=tokens)
        last = max(index for index, message in enumerate(self.messages) if message.role is Role.ASSISTANT)
        return Conversation(messages=tuple(self.messages[: last + 1]), tokens=tokens)

    def _ask_next(self) -> None:
        while self._pending:
            self.messages.append(self._pending.popleft())
            if self.messages[-1].role is Role.USER:
                return
        self.is_open = False


OnAnswer = Callable[[Dialogue, Answer], None]
"""Called with each answer after it was added to its dialogue."""


class Target(Protocol):
    """The model that answers, and may write prompts too."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings on which its answers depend, as JSON; the manifest keeps them."""

    def running(self) -> AbstractContextManager[None]:
        """Load or connect to the model for the time of this context.

        Raises:
            ValueError: the model or a setting is wrong.
            OSError: the model cannot be reached.

        """

    def converse(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        """Answer until no dialogue is open; raises as ``running``."""

    def write(self, requests: Sequence[TextRequest], on_text: OnText) -> list[WrittenText]:
        """Write one text for each request; raises as ``running``."""
