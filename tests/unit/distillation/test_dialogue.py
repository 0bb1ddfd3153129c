# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.data.prompts import parse_prompt
from vllm_medusa.data.record_files import BadLineCounter, BadLineError, BadLines, Source
from vllm_medusa.data.records import Completion, Conversation, Record, TurnTokens
from vllm_medusa.distillation.dialogue import Answer, Dialogue, PromptStyle, Sampling


def dialogue(value: Any, style: PromptStyle = PromptStyle.CHAT) -> Dialogue:
    sampling = Sampling((0.0,), 8, 0)
    return Dialogue(Source(Path("p"), 1), 0, parse_prompt(value), style, sampling, BadLineCounter(BadLines.REFUSE))


def turns(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ("human", "gpt") * len(contents)
    said = [{"from": role, "value": content} for role, content in zip(roles, contents, strict=False)]
    return {"conversations": ([{"from": "system", "value": system}] if system else []) + said}


def said(record: Record | None) -> list[tuple[str, str]]:
    assert isinstance(record, Conversation)
    return [(message.role.value, message.content) for message in record.messages]


def answer(text: str, *ids: int) -> Answer:
    return Answer(text, len(ids), TurnTokens(prompt_ids=(9,), completion_ids=ids) if ids else None)


def test_every_answer_is_the_target_s_own_on_top_of_its_former_ones():
    talk = dialogue(turns("a", "not kept", "b", "neither", "c", system="brief"))
    heard = []
    for text in ("A", "B", "C"):
        heard.append([message.content for message in talk.messages])
        talk.add_answer(answer(text, 1))
    assert heard == [["brief", "a"], ["brief", "a", "A", "b"], ["brief", "a", "A", "b", "B", "c"]]
    assert not talk.is_open
    expected = [("system", "brief"), *zip(("user", "assistant") * 3, "aAbBcC", strict=True)]
    assert said(talk.record()) == expected


@pytest.mark.parametrize("end", [lambda talk: talk.add_answer(answer(" \n")), lambda talk: talk.refuse("too long")])
def test_a_dialogue_that_ends_early_keeps_what_was_answered(end: Any):
    talk = dialogue(turns("a", "-", "b", "-", "c"))
    talk.add_answer(answer("A", 1))
    end(talk)
    assert not talk.is_open
    assert said(talk.record()) == [("user", "a"), ("assistant", "A")]


def test_a_prompt_that_nothing_is_answered_to_leaves_no_record():
    talk = dialogue(turns("a"))
    talk.add_answer(answer(""))
    assert talk.record() is None


def test_a_prompt_that_the_target_refuses_is_a_bad_line():
    with pytest.raises(BadLineError, match="p:1: too long"):
        dialogue(turns("a")).refuse("too long")


def test_tokens_are_recorded_where_all_are_known():
    talk = dialogue(turns("a", "-", "b"))
    talk.add_answer(answer("A", 1, 2))
    talk.add_answer(answer("B", 3))
    assert [turn.completion_ids for turn in talk.record().tokens] == [(1, 2), (3,)]
    talk = dialogue(turns("a", "-", "b"))
    talk.add_answer(answer("A", 1, 2))
    talk.add_answer(answer("B"))
    assert talk.record().tokens == ()


@pytest.mark.parametrize("value", [turns("a", "-", "b", system="s"), {"prompt": "a"}, {"text": "a"}])
def test_what_is_to_be_continued_is_the_first_turn(value: dict[str, Any]):
    talk = dialogue(value, PromptStyle.COMPLETION)
    talk.add_answer(answer(" A", 1, 2))
    assert not talk.is_open
    tokens = (TurnTokens(prompt_ids=(9,), completion_ids=(1, 2)),)
    assert talk.record() == Completion(prompt="a", completion=" A", tokens=tokens)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no turn is the user's"),
        (turns("a", "", " "), r"message 3 \(counted from 1\), the user's, is empty"),
        ({"prompt": ""}, "message 1 .* is empty"),
        ({"prompt": 1}, "content: input should be a valid string, got 1"),
        ({"body": "a"}, "holds 'body'; give 'messages', 'conversations', 'prompt' or 'text'"),
        ("a", "must be a JSON object, got 'a'"),
    ],
)
def test_a_line_without_a_prompt_is_refused_in_one_line(value: Any, reason: str):
    with pytest.raises(ValueError, match=reason) as refused:
        parse_prompt(value)
    assert "\n" not in str(refused.value)


def test_an_empty_answer_in_the_prompts_is_no_matter():
    assert parse_prompt(turns("a", "")).first_user_message.content == "a"


def test_temperatures_and_seeds_follow_from_the_seed_and_the_prompt_alone():
    sampling = Sampling((0.0, 0.5), 8, seed=0)
    of_turns = {(number, turn): sampling.of_turn(number, turn) for number in range(200) for turn in range(3)}
    assert len({drawn.seed for drawn in of_turns.values()}) == len(of_turns)
    assert all(drawn.temperature == of_turns[number, 0].temperature for (number, _), drawn in of_turns.items())
    assert 60 < sum(of_turns[number, 0].temperature == 0.5 for number in range(200)) < 140
    assert sampling.of_turn(7, 1) == Sampling((0.0, 0.5), 8, seed=0).of_turn(7, 1)
    assert sampling.of_turn(7, 1) != Sampling((0.0, 0.5), 8, seed=1).of_turn(7, 1)
    assert sampling.of_turn(7, 1).seed == 1095539639
