# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.toy.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from tests.unit.strategies import deterministic
from vllm_medusa.data.dataset import encode_record, label_all, load_blocks
from vllm_medusa.data.packing import IGNORED, OPEN_BLOCKS, Sample, pack_samples
from vllm_medusa.data.record_files import BadLineError, BadLines
from vllm_medusa.data.records import Completion, Conversation, Message, Role, Text, TurnTokens

PADDING = 7


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x): return x + 1", "class A: pass", "return"] * 5, vocab_size=300)


def jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def test_all_of_a_text_is_learnt(tokenizer: PreTrainedTokenizerFast):
    [sample] = encode_record(tokenizer, Text(text="def f"))
    assert sample.input_ids[0] == BOS_ID
    assert tokenizer.decode(sample.input_ids[1:]) == "def f"
    assert sample.labels == sample.input_ids


@pytest.mark.parametrize(
    ("prompt", "completion"), [("def f(x):", " return"), ("", "class A"), ("def f(x): ret", "urn x")]
)
def test_of_a_completion_the_prompt_is_not_learnt(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str):
    [sample] = encode_record(tokenizer, Completion(prompt=prompt, completion=completion))
    assert sample.input_ids == tokenizer(prompt + completion)["input_ids"]
    learnt = [label for label in sample.labels if label != IGNORED]
    assert sample.input_ids[-len(learnt) :] == learnt
    assert tokenizer.decode(learnt).endswith(completion)
    unlearnt = sample.input_ids[: -len(learnt)]
    assert unlearnt == tokenizer(prompt)["input_ids"][: len(unlearnt)]


def test_a_token_across_the_border_of_a_completion_is_learnt(tokenizer: PreTrainedTokenizerFast):
    assert len(tokenizer("return", add_special_tokens=False)["input_ids"]) == 1
    [sample] = encode_record(tokenizer, Completion(prompt="ret", completion="urn"))
    assert sample.labels == [IGNORED, sample.input_ids[1]]


def test_known_tokens_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast):
    tokens = (TurnTokens(prompt_ids=(BOS_ID, 9, 8), completion_ids=(5, EOS_ID)),)
    record = Completion(prompt="anything", completion="else", tokens=tokens)
    assert encode_record(tokenizer, record) == [Sample([BOS_ID, 9, 8, 5, EOS_ID], [IGNORED] * 3 + [5, EOS_ID])]


def two_answers(*tokens: TurnTokens) -> Conversation:
    roles = (Role.USER, Role.ASSISTANT, Role.USER, Role.ASSISTANT)
    return Conversation(messages=tuple(Message(role=role, content="x") for role in roles), tokens=tokens)


def test_turns_that_continue_each_other_are_one_sample(tokenizer: PreTrainedTokenizerFast):
    record = two_answers(
        TurnTokens(prompt_ids=(2, 3), completion_ids=(4, 5)),
        TurnTokens(prompt_ids=(2, 3, 4, 5, 6), completion_ids=(7,)),
    )
    assert encode_record(tokenizer, record) == [Sample([2, 3, 4, 5, 6, 7], [IGNORED, IGNORED, 4, 5, IGNORED, 7])]


def test_turns_whose_history_was_tokenised_anew_are_samples_of_their_own(tokenizer: PreTrainedTokenizerFast):
    record = two_answers(
        TurnTokens(prompt_ids=(2, 3), completion_ids=(4, 5)), TurnTokens(prompt_ids=(2, 3, 9, 6), completion_ids=(7,))
    )
    assert encode_record(tokenizer, record) == [
        Sample([2, 3, 4, 5], [IGNORED, IGNORED, 4, 5]),
        Sample([2, 3, 9, 6, 7], [IGNORED] * 4 + [7]),
    ]


def test_tokens_of_another_tokenizer_are_refused(tokenizer: PreTrainedTokenizerFast):
    record = Completion(prompt="p", completion="c", tokens=(TurnTokens(prompt_ids=(2,), completion_ids=(300,)),))
    with pytest.raises(ValueError, match=f"token id 300 is not one of the tokenizer's {len(tokenizer)}"):
        encode_record(tokenizer, record)


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Samples whose tokens, from 100 on, are all different."""
    masks = draw(st.lists(st.lists(st.booleans(), max_size=30), max_size=150))
    samples, first = [], 100
    for mask in masks:
        ids = list(range(first, first + len(mask)))
        samples.append(Sample(ids, [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)]))
        first += len(mask)
    return samples


def labelled(samples: Sequence[Sample]) -> list[int]:
    return sorted(label for sample in samples for label in sample.labels if label != IGNORED)


@deterministic
@given(sample_lists(), st.integers(1, 40))
def test_packing_keeps_every_label_and_every_sample_that_fits_whole(samples: list[Sample], length: int):
    blocks = list(pack_samples(samples, length, PADDING))
    assert labelled(blocks) == labelled(samples)
    for block in blocks:
        assert len(block.input_ids) == len(block.labels) == length
        assert labelled([block])
        assert all(label in (token, IGNORED) for token, label in zip(block.input_ids, block.labels, strict=True))
        assert block.input_ids == sorted(set(block.input_ids) - {PADDING}) + [PADDING] * block.input_ids.count(PADDING)
    homes = {token: index for index, block in enumerate(blocks) for token in block.input_ids}
    for sample in samples:
        if len(sample) <= length and labelled([sample]):
            assert len({homes.get(token) for token in sample.input_ids}) == 1


def test_a_long_sample_is_cut_and_its_pieces_without_labels_left_out():
    ids = list(range(100, 110))
    [first, second] = pack_samples([Sample(ids, [IGNORED] * 4 + ids[4:])], 4, PADDING)
    assert (first.input_ids, first.labels) == (ids[4:8], ids[4:8])
    assert (second.input_ids, second.labels) == ([108, 109, PADDING, PADDING], [108, 109, IGNORED, IGNORED])


def test_blocks_are_filled_but_for_little():
    lengths = [5 + index * 37 % 90 for index in range(20 * OPEN_BLOCKS)]
    blocks = list(pack_samples((Sample([1] * length, [1] * length) for length in lengths), 100, PADDING))
    assert 100 * len(blocks) < 1.05 * sum(lengths)


def test_files_become_blocks_of_one_length(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    first = jsonl(tmp_path / "a.jsonl", {"text": "def f(x): return x"}, {"prompt": "class", "completion": " A: pass"})
    second = tmp_path / "b.txt"
    second.write_text("def f(x)\n")
    blocks = load_blocks([first, second], tokenizer, 64, BadLines.REFUSE)
    assert blocks.column_names == ["input_ids", "labels"]
    ids, labels = blocks[0]["input_ids"], blocks[0]["labels"]
    texts = ["def f(x): return x", "class A: pass", "def f(x)"]
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert len(blocks) == 1
    assert ids == expected + [EOS_ID] * (64 - len(expected))
    assert len(labels) == 64
    assert labels.count(IGNORED) == 64 - len(expected) + len(tokenizer("class")["input_ids"])
    assert blocks.cache_files == []


def test_bad_lines_are_refused_or_skipped_wherever_they_turn_out_bad(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    dialogue = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = jsonl(tmp_path / "some.jsonl", {"text": "def"}, dialogue, {"text": ""}, {"text": "class"})
    with pytest.raises(BadLineError, match=f"{file}:2: .*has no chat template"):
        load_blocks([file], tokenizer, 8, BadLines.REFUSE)
    with caplog.at_level(logging.WARNING):
        blocks = load_blocks([file], tokenizer, 8, BadLines.SKIP)
    assert len(blocks) == 1
    assert [message.partition(";")[0] for message in caplog.messages] == ["bad lines skipped: 2"]


def test_all_tokens_but_the_padding_can_be_labels(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    pairs = [("what is it? ", "a lamp"), ("and that? ", "a long chair of wood"), ("really? ", "yes")]
    file = jsonl(tmp_path / "a.jsonl", *({"prompt": prompt, "completion": answer} for prompt, answer in pairs))
    blocks = load_blocks((file,), tokenizer, 32, BadLines.REFUSE)
    for before, after in zip(blocks, label_all(blocks), strict=True):
        ids, labels = before["input_ids"], before["labels"]
        end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        assert labels[0] == IGNORED
        assert after == {"input_ids": ids, "labels": ids[:end] + [IGNORED] * (32 - end)}


def test_nothing_to_train_on_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    file = jsonl(tmp_path / "bad.jsonl", {"text": ""})
    with pytest.raises(ValueError, match=f"nothing to train on in {file}: {file}:1: text: "):
        load_blocks([file], tokenizer, 8, BadLines.SKIP)
