# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.unit.evaluated import write_target
from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.data.record_files import BadLines
from vllm_medusa.distillation.dialogue import PromptStyle
from vllm_medusa.evaluation.text import Sources, held_out_samples

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def target(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory).eval()


@pytest.fixture
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def samples(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Path | None = None,
    data: Path | None = None,
    style: PromptStyle | None = None,
    bad_lines: BadLines = BadLines.REFUSE,
    new_tokens: int = 8,
    max_length: int = 100,
) -> list[Sample]:
    sources = Sources((prompts,) if prompts else (), (data,) if data else (), style, bad_lines, new_tokens, max_length)
    return held_out_samples(target, tokenizer, sources, batch_size=2)


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def prompt_of(sample: Sample) -> list[int]:
    return [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label == IGNORED]


@pytest.fixture
def prompts(tmp_path: Path) -> list[Path]:
    (tmp_path / "prompts.txt").write_text("import os\n\nreturn\n")
    system = {"role": "system", "content": "be kind"}
    answered = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}, {"from": "human", "value": "z"}]
    values = [{"prompt": "def"}, {"messages": [system, {"role": "user", "content": "x"}]}, {"conversations": answered}]
    return [tmp_path / "prompts.txt", lines(tmp_path / "prompts.jsonl", *values)]


@pytest.mark.parametrize("style", [None, PromptStyle.COMPLETION])
def test_prompts_are_continued_where_there_is_no_chat_template_or_on_request(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[Path], style: PromptStyle | None
) -> None:
    tokenizer.chat_template = None if style is None else CHAT_TEMPLATE
    found = [sample for file in prompts for sample in samples(target, tokenizer, prompts=file, style=style)]
    texts = [tokenizer.decode(prompt_of(sample)) for sample in found]
    assert texts == ["<s>import os", "<s>return", "<s>def", "<s>x", "<s>x"]
    assert all(0 < len(sample) - len(prompt_of(sample)) <= 8 for sample in found)


def test_first_questions_are_answered_in_the_chat_template(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[Path]
) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    found = [sample for file in prompts for sample in samples(target, tokenizer, prompts=file)]
    texts = [tokenizer.decode(prompt_of(sample)) for sample in found]
    assert texts == ["u:import os;a:", "u:return;a:", "u:def;a:", "s:be kind;u:x;a:", "u:x;a:"]


def test_data_is_taken_as_it_is_and_cut(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokens = {"prompt_ids": [0, 5], "completion_ids": [6, 7, 8, 9, 10]}
    data = lines(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b", "tokens": [tokens]})
    [sample] = samples(target, tokenizer, data=data, max_length=5)
    assert sample == Sample([0, 5, 6, 7, 8], [IGNORED, IGNORED, 6, 7, 8])


def test_a_conversation_needs_a_chat_template(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: the tokenizer of .* has no chat template"):
        samples(target, tokenizer, prompts=prompts, style=PromptStyle.CHAT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"question": "x"}, "holds 'question'; give"),
        (["x"], "must be a JSON object"),
        ({"prompt": "x" * 500}, r"the prompt has \d+ tokens, .* leaves room for 92"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_place_or_skipped(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, value: object, message: str
) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", {"prompt": "def"}, value)
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: .*{message}") as error:
        samples(target, tokenizer, prompts=prompts)
    assert "\n" not in str(error.value)
    assert len(samples(target, tokenizer, prompts=prompts, bad_lines=BadLines.SKIP)) == 1
    with pytest.raises(ValueError, match=rf"no valid line in .*\.jsonl: .*only\.jsonl:1: .*{message}"):
        samples(target, tokenizer, prompts=lines(tmp_path / "only.jsonl", value), bad_lines=BadLines.SKIP)


def test_the_targets_own_limit_goes_before_a_greater_length(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", {"prompt": "x" * 500})
    with pytest.raises(ValueError, match="leaves room for 120"):  # Of 128 positions.
        samples(target, tokenizer, prompts=prompts, max_length=4096)


@pytest.mark.parametrize("given", [{}, {"prompts": Path("a.txt"), "data": Path("b.txt")}])
def test_prompts_or_data_are_needed_and_not_both(
    target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, given: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r"either --prompts, .* or --data"):
        samples(target, tokenizer, **given)


def test_new_tokens_must_leave_room_for_a_prompt(target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"new_tokens must be less than max_length \(8\), got 8"):
        samples(target, tokenizer, prompts=Path("a.txt"), max_length=8)
