"""Self-distillation's dialogues: the target answers every turn of the user, on top of its own former answers."""

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


class PromptStyle(StrEnum):
    """How a prompt reaches the target: in its chat template, to be answered, or as it is, to be continued."""

    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True)
class TurnSampling:
    """How the target chooses the tokens of one answer.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: of the answer.
        seed: what the random numbers follow from, 31 bits; nothing else that runs has a part in them.

    """

    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How the target chooses tokens.

    Attributes:
        temperatures: each dialogue gets one of them.
        max_tokens: tokens of an answer at most.
        seed: what everything random follows from, which temperature a dialogue gets included.

    """

    temperatures: Sequence[float]
    max_tokens: int
    seed: int

    def of_turn(self, dialogue: int, turn: int) -> TurnSampling:
        """Return what holds for one answer, given the numbers of its dialogue and its turn, counted from 0."""
        temperature = self.temperatures[self._draw(f"{dialogue}") % len(self.temperatures)]
        return TurnSampling(temperature, self.max_tokens, self._draw(f"{dialogue}/{turn}"))

    def _draw(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Answer:
    """What the target says.

    Attributes:
        text: without special tokens.
        num_tokens: tokens emitted.
        tokens: all tokens of the turn; None where a server does not tell them.

    """

    text: str
    num_tokens: int
    tokens: TurnTokens | None


class Dialogue:
    """Puts one turn of the user after the other to the target.

    It is over when the user has said everything, when the target answers with nothing, or when the target refuses what
    there is to answer. A turn without an answer leaves no trace.

    Args:
        source: where the seed stands.
        number: of the dialogue, counted from 0.
        seed: what the user says; where prompts are to be continued, the first turn alone.
        style: how prompts reach the target.
        sampling: how the target chooses tokens.
        bad_lines: is told if the target does not take even the first turn.

    Attributes:
        messages: what the target is to answer.
        is_open: whether there is anything to answer.

    """

    def __init__(
        self,
        source: Source,
        number: int,
        seed: Prompt,
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
        self._unsaid = deque(seed.prompts if style is PromptStyle.CHAT else [seed.first_user_message])
        self._answers: list[Answer] = []
        self._prompt()

    @property
    def turn_sampling(self) -> TurnSampling:
        """How the target is to choose the next answer's tokens."""
        return self._sampling.of_turn(self._number, len(self._answers))

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.num_tokens for answer in self._answers)

    def add_answer(self, answer: Answer) -> None:
        """Take the target's answer, and go on to the user's next turn."""
        if not answer.text.strip():
            self.is_open = False
            return
        self._answers.append(answer)
        self.messages.append(Message(role=Role.ASSISTANT, content=answer.text))
        self._prompt()

    def refuse(self, reason: str) -> None:
        """End it: the messages are too long for the target, or its chat template refuses them.

        Raises:
            BadLineError: nothing was answered, and bad lines are refused.

        """
        self.is_open = False
        if not self._answers:
            self._bad_lines.add(self.source, reason)

    def record(self) -> Conversation | Completion | None:
        """Return what was said, with the target's tokens if all are known; None if nothing was answered."""
        if not self._answers:
            return None
        known = [answer.tokens for answer in self._answers if answer.tokens is not None]
        tokens = tuple(known) if len(known) == len(self._answers) else ()
        if self.style is PromptStyle.COMPLETION:
            return Completion(prompt=self.messages[0].content, completion=self._answers[0].text, tokens=tokens)
        last = max(index for index, message in enumerate(self.messages) if message.role is Role.ASSISTANT)
        return Conversation(messages=tuple(self.messages[: last + 1]), tokens=tokens)

    def _prompt(self) -> None:
        while self._unsaid:
            self.messages.append(self._unsaid.popleft())
            if self.messages[-1].role is Role.USER:
                return
        self.is_open = False


OnAnswer = Callable[[Dialogue, Answer], None]
"""Is told of every answer once its dialogue has heard it."""


class Target(Protocol):
    """The model that answers."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What, with the dialogues, its answers follow from; JSON."""

    def running(self) -> AbstractContextManager[None]:
        """Be ready for dialogues within this context.

        Raises:
            ValueError: the model or a setting is no good.
            OSError: the model cannot be reached.

        """

    def converse(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        """Answer until no dialogue is open any more.

        Raises:
            ValueError: a setting or a prompt is no good.
            OSError: the model cannot be reached.

        """
