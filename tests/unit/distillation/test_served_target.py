# SPDX-License-Identifier: Apache-2.0
"""Requests to a stub server and its errors; tests/e2e compares a real server's answers with those of ``vllm.LLM``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.stub_server import CHAT, MODELS, TEXT, serve
from vllm_medusa.data.prompts import Prompt, parse_prompt
from vllm_medusa.data.record_files import BadLineCounter, BadLineError, BadLines, Source
from vllm_medusa.data.records import Completion, Conversation, TurnTokens
from vllm_medusa.distillation import served_target
from vllm_medusa.distillation.dialogue import Dialogue, PromptStyle, Sampling
from vllm_medusa.distillation.raw_text import TextRequest, WrittenText
from vllm_medusa.distillation.served_target import ServedTarget

SAMPLING = Sampling((0.5,), 8, seed=3)
DIALOGUE = parse_prompt({"messages": [{"role": "user", "content": content} for content in ("a", "b")]})


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_target, "RETRIES", 0)


def dialogue(prompt: Prompt = DIALOGUE, style: PromptStyle = PromptStyle.CHAT) -> Dialogue:
    return Dialogue(Source(Path("p"), 1), 0, prompt, style, SAMPLING, BadLineCounter(BadLines.REFUSE))


def converse(url: str, *dialogues: Dialogue, model: str = "tiny") -> list[int]:
    """Return the number of tokens of each answer."""
    counted: list[int] = []
    target = ServedTarget(url, model, concurrency=2)
    with target.running():
        target.converse(dialogues, lambda _, answer: counted.append(answer.num_tokens))
    return counted


def test_a_dialogue_is_sent_turn_by_turn_with_its_sampling():
    with serve(models=(200, MODELS), chat_completions=(200, CHAT)) as (url, script):
        talk = dialogue()
        assert converse(url, talk) == [2, 2]
    record = talk.record()
    assert isinstance(record, Conversation)
    assert [message.content for message in record.messages] == ["a", "A", "b", "A"]
    assert record.tokens == ()
    sent = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "b"}]
    assert [request["messages"] for request in script.requests] == [sent[:1], sent]
    for turn, request in enumerate(script.requests):
        sampling = SAMPLING.of_turn(0, turn)
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0.5, 8)
        assert request["seed"] == sampling.seed
        assert request["return_token_ids"] is True


def test_tokens_are_kept_where_the_server_tells_them():
    told = CHAT | {"prompt_token_ids": [1, 2], "choices": [CHAT["choices"][0] | {"token_ids": [3, 4]}]}
    with serve(models=(200, MODELS), chat_completions=(200, told)) as (url, _):
        talk = dialogue(parse_prompt({"prompt": "a"}))
        converse(url, talk)
    assert talk.record().tokens == (TurnTokens(prompt_ids=(1, 2), completion_ids=(3, 4)),)


def test_a_prompt_is_continued_where_that_is_asked_for():
    told = TEXT | {"choices": [TEXT["choices"][0] | {"prompt_token_ids": [1], "token_ids": [3, 4]}]}
    with serve(models=(200, MODELS), completions=(200, told)) as (url, script):
        talk = dialogue(style=PromptStyle.COMPLETION)
        converse(url, talk)
    tokens = (TurnTokens(prompt_ids=(1,), completion_ids=(3, 4)),)
    assert talk.record() == Completion(prompt="a", completion=" A", tokens=tokens)
    assert script.requests[0]["prompt"] == "a"


def test_raw_text_is_asked_for_by_tokens():
    told = TEXT | {"choices": [TEXT["choices"][0] | {"finish_reason": "length"}]}
    request = TextRequest(prompt_ids=(1, 2), stop="<|end|>", temperature=1.0, top_p=0.9, max_tokens=8, seed=5)
    written: list[WrittenText] = []
    for answer, ended in ((TEXT, True), (told, False)):
        with serve(completions=(200, answer)) as (url, script):
            [text] = ServedTarget(url, "tiny", concurrency=2).write([request], written.append)
        assert text == WrittenText(" A", 2, ended)
        [body] = script.requests
        assert (body["prompt"], body["stop"], body["skip_special_tokens"]) == ([1, 2], "<|end|>", False)
        assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (1.0, 0.9, 8, 5)
    assert len(written) == 2


def test_a_server_that_completes_no_raw_text_is_named():
    request = TextRequest(prompt_ids=(1, 2), stop="<|end|>", temperature=1.0, top_p=0.9, max_tokens=8, seed=5)
    refused = (404, {"error": {"message": "no such path"}})
    with serve(completions=refused) as (url, _), pytest.raises(ValueError, match=f"{url} refuses .*: no such path"):
        ServedTarget(url, "tiny", concurrency=2).write([request], lambda text: None)


def test_a_prompt_that_the_server_refuses_is_a_bad_line():
    refused = (400, {"error": {"message": "too\nlong", "code": 400}})
    reason = "p:1: the server refuses it: too long"
    with serve(models=(200, MODELS), chat_completions=refused) as (url, _), pytest.raises(BadLineError, match=reason):
        converse(url, dialogue())


@pytest.mark.parametrize(
    ("answers", "error", "reason"),
    [
        (
            {"models": (200, MODELS), "chat_completions": (500, {"error": {"message": "out of it"}})},
            OSError,
            "out of it",
        ),
        ({"models": (200, MODELS), "chat_completions": (404, {"message": "gone"})}, ValueError, "refuses .*: gone"),
        ({"models": (401, {"error": {"message": "who are you?"}})}, ValueError, "refuses .*: who are you"),
    ],
)
def test_a_server_that_fails_is_named(answers: dict[str, Any], error: type[Exception], reason: str):
    with serve(**answers) as (url, _), pytest.raises(error, match=f"{url} .*{reason}"):
        converse(url, dialogue())


def test_a_model_that_is_not_served_is_refused_by_name():
    reason = "/v1 does not serve model 'huge'; it serves tiny"
    with serve(models=(200, MODELS)) as (url, _), pytest.raises(ValueError, match=reason):
        converse(url, dialogue(), model="huge")


def test_a_server_that_does_not_run_is_named():
    with serve() as (url, _):
        pass
    with pytest.raises(ConnectionError, match=f"no answer from {url}: .*; is the server running"):
        converse(url, dialogue())
