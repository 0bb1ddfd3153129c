# SPDX-License-Identifier: Apache-2.0
"""A target behind an OpenAI-compatible server, such as ``vllm serve``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from vllm_medusa.data.records import TurnTokens
from vllm_medusa.distillation.dialogue import Answer, Dialogue, OnAnswer, PromptStyle
from vllm_medusa.distillation.raw_text import OnText, TextRequest, WrittenText

RETRIES = 5
"""Retries of a request if the server is busy or does not answer, with exponential backoff."""


@dataclass(frozen=True)
class ServedTarget:
    """A ``Target`` that sends requests to a server, with the key in ``OPENAI_API_KEY`` if it is set.

    Attributes:
        url: the server's base URL, ending in ``/v1``.
        model: the served model's name.
        concurrency: how many dialogues run at the same time.

    """

    url: str
    model: str
    concurrency: int

    @property
    def settings(self) -> dict[str, Any]:
        return {"engine": "server"}  # Without the URL, since a run may be resumed with another server.

    @contextmanager
    def running(self) -> Iterator[None]:
        """Check that the server has the model (see ``Target``)."""
        with self._explained_errors(), openai.OpenAI(base_url=self.url, api_key=_key(), max_retries=0) as client:
            models = [model.id for model in client.models.list()]
        if self.model not in models:
            raise ValueError(f"{self.url} does not serve model {self.model!r}; it serves {', '.join(models) or 'none'}")
        yield

    def converse(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        with self._explained_errors():
            asyncio.run(self._converse_with_all(dialogues, on_answer))

    def write(self, requests: Sequence[TextRequest], on_text: OnText) -> list[WrittenText]:
        with self._explained_errors():
            return asyncio.run(self._write_all(requests, on_text))

    async def _write_all(self, requests: Sequence[TextRequest], on_text: OnText) -> list[WrittenText]:
        slots = asyncio.Semaphore(self.concurrency)
        async with openai.AsyncOpenAI(base_url=self.url, api_key=_key(), max_retries=RETRIES) as client:
            return await asyncio.gather(*(self._write(client, slots, request, on_text) for request in requests))

    async def _write(
        self, client: openai.AsyncOpenAI, slots: asyncio.Semaphore, request: TextRequest, on_text: OnText
    ) -> WrittenText:
        """Request the completion of token ids, since the server would put a second beginning before text."""
        async with slots:
            completion = await client.completions.create(
                model=self.model,
                prompt=list(request.prompt_ids),
                stop=request.stop,
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens,
                seed=request.seed,
                extra_body={"skip_special_tokens": False},
            )
        choice, usage = completion.choices[0], completion.usage
        text = WrittenText(choice.text, usage.completion_tokens if usage else 0, choice.finish_reason == "stop")
        on_text(text)
        return text

    async def _converse_with_all(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        slots = asyncio.Semaphore(self.concurrency)
        async with openai.AsyncOpenAI(base_url=self.url, api_key=_key(), max_retries=RETRIES) as client:
            await asyncio.gather(*(self._converse(client, slots, dialogue, on_answer) for dialogue in dialogues))

    async def _converse(
        self, client: openai.AsyncOpenAI, slots: asyncio.Semaphore, dialogue: Dialogue, on_answer: OnAnswer
    ) -> None:
        async with slots:
            while dialogue.is_open:
                try:
                    answer = await self._ask(client, dialogue)
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    dialogue.refuse(f"the server refuses it: {_reason(error)}")
                else:
                    dialogue.add_answer(answer)
                    on_answer(dialogue, answer)

    async def _ask(self, client: openai.AsyncOpenAI, dialogue: Dialogue) -> Answer:
        """Request one answer and its token ids, which vLLM returns and other servers do not."""
        sampling = dialogue.turn_sampling
        options: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
            "extra_body": {"return_token_ids": True},
        }
        if dialogue.style is PromptStyle.CHAT:
            messages: Any = [message.model_dump(mode="json") for message in dialogue.messages]
            chat = await client.chat.completions.create(messages=messages, **options)
            choice = chat.choices[0]
            return _answer(choice.message.content, chat.usage, getattr(chat, "prompt_token_ids", None), choice)
        completion = await client.completions.create(prompt=dialogue.messages[-1].content, **options)
        choice = completion.choices[0]
        return _answer(choice.text, completion.usage, getattr(choice, "prompt_token_ids", None), choice)

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except openai.APIConnectionError as error:
            raise ConnectionError(f"no answer from {self.url}: {error}; is the server running?") from error
        except openai.InternalServerError as error:
            raise ConnectionError(f"{self.url} fails: {_reason(error)}; the finished files stay") from error
        except openai.APIStatusError as error:
            raise ValueError(f"{self.url} refuses the request: {_reason(error)}") from error


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "none")


def _answer(text: str | None, usage: Any, prompt_ids: list[int] | None, choice: Any) -> Answer:
    completion_ids = getattr(choice, "token_ids", None)
    tokens = None
    if prompt_ids and completion_ids:
        tokens = TurnTokens(prompt_ids=tuple(prompt_ids), completion_ids=tuple(completion_ids))
    return Answer(text or "", usage.completion_tokens if usage else len(completion_ids or ()), tokens)


def _reason(error: openai.APIStatusError) -> str:
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return " ".join(str(message or error).split())
