# SPDX-License-Identifier: Apache-2.0
import io
import json
import logging
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.data.json_array import ArraySyntaxError, array_items
from vllm_medusa.data.record_files import BadLineCounter, BadLineError, BadLines, read_records
from vllm_medusa.data.records import Completion, Conversation, Message, Record, Role, Text, TurnTokens, parse_record

HELLO = Conversation(messages=(Message(role=Role.USER, content="Hello?"), Message(role=Role.ASSISTANT, content="Hi.")))
SHAREGPT = {"id": "x", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]}
OPENAI = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]}


def read(file: Path, policy: BadLines = BadLines.REFUSE) -> list[Record]:
    return [record for _, record in read_records([file], BadLineCounter(policy))]


def written(directory: Path, name: str, text: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SHAREGPT, HELLO),
        (OPENAI, HELLO),
        ({"prompt": "1 + 1 =", "completion": " 2", "lang": "en"}, Completion(prompt="1 + 1 =", completion=" 2")),
        ({"text": "a document"}, Text(text="a document")),
    ],
    ids=["ShareGPT", "OpenAI", "completion", "text"],
)
def test_published_forms_are_understood(value: dict[str, Any], expected: Record):
    assert parse_record(value) == expected


def test_a_record_survives_being_written():
    tokens = (TurnTokens(prompt_ids=(1, 2), completion_ids=(3,)),)
    for record in (
        HELLO,
        HELLO.model_copy(update={"tokens": tokens}),
        Completion(prompt="p", completion="c", tokens=tokens),
    ):
        assert parse_record(json.loads(record.model_dump_json())) == record


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1], r"must be a JSON object, got \[1\]"),
        ({"id": 1, "body": ""}, "holds 'id', 'body'; give 'messages', 'conversations', 'prompt' and 'completion', or"),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            r"conversations\.0\.from: .*'system', 'user' or 'assistant', got 'tool'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "content: input should be a valid string, got None"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": "Hello?"}]}, "no turn is the assistant's"),
        ({"messages": []}, "no turn is the assistant's"),
        (
            {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": " \n"}]},
            r"message 2 \(counted from 1\), the assistant's, is empty",
        ),
        ({"prompt": "Hello?", "completion": ""}, "completion: .* at least 1 character"),
        ({"text": ""}, "text: .* at least 1 character"),
        ({**OPENAI, "tokens": [{"prompt_ids": [], "completion_ids": [1]}] * 2}, "tokens of 2 turns, .* has 1"),
        ({**OPENAI, "tokens": [{"prompt_ids": [-1], "completion_ids": [1]}]}, "greater than or equal to 0, got -1"),
    ],
)
def test_a_bad_record_is_refused_in_one_line(value: Any, reason: str):
    with pytest.raises(ValueError, match=reason) as refused:
        parse_record(value)
    assert "\n" not in str(refused.value)


def test_json_lines_an_array_and_plain_text_are_read(tmp_path: Path):
    lines = f"\ufeff{json.dumps(SHAREGPT)}\r\n\n{json.dumps({'text': 'é'})}"
    expected = [HELLO, Text(text="é")]
    assert read(written(tmp_path, "lines.jsonl", lines)) == expected
    assert read(written(tmp_path, "lines.json", lines)) == expected
    array = json.dumps([SHAREGPT, {"text": "é"}], indent=2, ensure_ascii=False)
    assert read(written(tmp_path, "array.json", f"\n {array}\n")) == expected
    assert read(written(tmp_path, "plain.txt", "one\n\n two \r\n")) == [Text(text="one"), Text(text="two")]
    assert read(written(tmp_path, "empty.jsonl", "")) == []


def test_a_directory_stands_for_its_json_lines_in_order(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is a directory without \.jsonl files"):
        read(tmp_path)
    for name, text in (("b.jsonl", '{"text": "b"}'), ("a.jsonl", '{"text": "a"}'), ("manifest.json", "{}")):
        written(tmp_path, name, text)
    assert read(tmp_path) == [Text(text="a"), Text(text="b")]


def test_a_bad_line_is_named(tmp_path: Path):
    good = json.dumps(OPENAI)
    broken = written(tmp_path, "broken.jsonl", f'{good}\n{{"text": \n')
    with pytest.raises(BadLineError, match=rf"{broken}:2: not JSON: Expecting value at character 9"):
        read(broken)
    latin = written(tmp_path, "latin.txt", b"good\n\nb\xe9d\n")
    with pytest.raises(BadLineError, match=f"{latin}:3: not UTF-8: .* at byte 2"):
        read(latin)
    wrong = written(tmp_path, "wrong.json", json.dumps([OPENAI, {"body": 1}], indent=1))
    line = wrong.read_text().splitlines().index('  "body": 1')
    with pytest.raises(BadLineError, match=f"{wrong}:{line}: holds 'body'"):
        read(wrong)


def test_bad_lines_are_skipped_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = written(tmp_path, "some.jsonl", f'{json.dumps(OPENAI)}\n{{\n"\xe9"\n{{"text": "t"}}\n'.encode("latin-1"))
    counter = BadLineCounter(BadLines.SKIP)
    assert [record for _, record in read_records([file], counter)] == [HELLO, Text(text="t")]
    assert counter.count == 2
    with caplog.at_level(logging.WARNING):
        counter.report()
    assert caplog.messages == [f"bad lines skipped: 2; the first is {counter.first}"]
    assert str(counter.first).startswith(f"{file}:2: not JSON: ")


def test_nothing_is_reported_where_nothing_was_skipped(caplog: pytest.LogCaptureFixture):
    BadLineCounter(BadLines.SKIP).report()
    assert caplog.messages == []


def test_a_broken_array_is_refused_even_where_bad_lines_are_skipped(tmp_path: Path):
    file = written(tmp_path, "cut.json", '[\n{"text": "a"},\n{"text": "b"')
    with pytest.raises(ValueError, match=rf"{file}:3: the JSON array is broken: "):
        read(file, BadLines.SKIP)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path):
    file = written(tmp_path, "data.parquet", "")
    with pytest.raises(ValueError, match=r"unknown kind of file '\.parquet'; give \.json, \.jsonl or \.txt"):
        read(file)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(string.printable),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=8,
)


@deterministic
@given(st.lists(VALUES), st.sampled_from([None, 1]), st.integers(1, 40))
def test_an_array_is_read_alike_in_chunks_of_any_size(values: list[Any], indent: int | None, chunk: int):
    text = json.dumps(values, indent=indent)
    items = list(array_items(io.StringIO(text), chunk))
    assert [value for _, value in items] == values
    firsts = {line: text.splitlines()[line - 1].strip() for line, _ in items}
    for line, value in items:
        first = json.dumps(value, indent=indent).splitlines()[0]
        assert first in firsts[line] if indent is None else firsts[line].removesuffix(",") == first


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("", "it ends early", 1),
        ("{}", r"expected '\[', got '\{'", 1),
        ("[1,\n2", "it ends early", 2),
        ("[1\n2]", "expected ',' or ']', got '2'", 2),
        ("[1,\n]", "Expecting value", 2),
        ('[{"a": 1,\n"b" 2}]', "Expecting ':' delimiter", 2),
        ("[1]\n[2]", r"'\[' follows the array's end", 2),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_broken_array_names_its_line(text: str, reason: str, line: int, chunk: int):
    with pytest.raises(ArraySyntaxError, match=reason) as broken:
        list(array_items(io.StringIO(text), chunk))
    assert broken.value.line == line
