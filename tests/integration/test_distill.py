# SPDX-License-Identifier: Apache-2.0
"""Self-distillation with a real engine: records hold the target's own answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from vllm import LLM

from tests.integration.distillation import CHAT_TEMPLATE, DIALOGUE, SharedEngineTarget, read_back, write_lines
from tests.integration.engines import engine
from vllm_medusa.data.chat import encode_prompt
from vllm_medusa.data.dataset import load_blocks
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.data.record_files import BadLineCounter, BadLineError, BadLines
from vllm_medusa.data.records import Completion, Conversation, Role
from vllm_medusa.distillation.dialogue import PromptStyle
from vllm_medusa.distillation.manifest import Counts, Manifest
from vllm_medusa.distillation.offline_target import OfflineTarget
from vllm_medusa.distillation.raw_text import TextRequest, WrittenText
from vllm_medusa.distillation.run import DistillConfig, distill

TOKENS = 16
CONTEXT = 128
PROMPTS = ("def add(x, y):", "class Point:", "import os\n", "for i in range(10):", "return self.", "try:")


@pytest.fixture(scope="module")
def llm(tiny_target: Path) -> Iterator[LLM]:
    with engine(tiny_target, skip_tokenizer_init=False, max_model_len=CONTEXT) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_target)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_target, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def reference(tiny_target: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)


def continuation(reference: PreTrainedModel, prompt_ids: Sequence[int]) -> list[int]:
    """The greedy continuation by ``transformers``."""
    prompt = torch.tensor([list(prompt_ids)])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 1}
    with torch.no_grad():
        return reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, len(prompt_ids) :
        ].tolist()


def run(
    target: OfflineTarget, style: PromptStyle, prompts: Path, output: Path, skip: bool = False, **settings: Any
) -> Manifest:
    config = DistillConfig(model="tiny", style=style, max_tokens=TOKENS, **{"temperature": (0.0,), **settings})
    bad_lines = BadLineCounter(BadLines.SKIP if skip else BadLines.REFUSE)
    return distill([prompts], output, config, target, bad_lines, show_progress=False)


def test_a_greedy_completion_is_the_target_s_continuation_and_all_that_is_learnt(
    llm: LLM, tokenizer: PreTrainedTokenizerBase, reference: PreTrainedModel, tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    target = SharedEngineTarget(llm, tokenizer)
    manifest = run(target, PromptStyle.COMPLETION, prompts, tmp_path / "set", shard_size=4)
    expected = {prompt: continuation(reference, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}
    assert manifest.counts == Counts(prompts=6, records=6, tokens=sum(map(len, expected.values())))
    for record, prompt in zip(read_back(tmp_path / "set"), PROMPTS, strict=True):
        assert isinstance(record, Completion)
        assert record.prompt == prompt
        assert list(record.tokens[0].prompt_ids) == tokenizer(prompt)["input_ids"]
        assert list(record.tokens[0].completion_ids) == expected[prompt]
        assert record.completion == tokenizer.decode(expected[prompt], skip_special_tokens=True)
    blocks = load_blocks([tmp_path / "set"], tokenizer, 512, BadLines.REFUSE)
    learnt = [label for labels in blocks["labels"] for label in labels if label != IGNORED]
    assert learnt == [token for prompt in PROMPTS for token in expected[prompt]]


def test_a_sampled_answer_follows_from_its_prompt_not_from_what_runs_beside_it(
    llm: LLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    target = SharedEngineTarget(llm, tokenizer)
    for size in (1, 4):
        output = tmp_path / str(size)
        run(target, PromptStyle.COMPLETION, prompts, output, shard_size=size, temperature=(0.0, 1.0))
    assert read_back(tmp_path / "1") == read_back(tmp_path / "4")
    run(target, PromptStyle.COMPLETION, prompts, tmp_path / "other", temperature=(0.0, 1.0), seed=1)
    assert read_back(tmp_path / "1") != read_back(tmp_path / "other")


def test_each_turn_is_the_target_s_answer_to_its_own_former_ones(
    llm: LLM, chat_tokenizer: PreTrainedTokenizerBase, reference: PreTrainedModel, tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", DIALOGUE, {"prompt": "import os"})
    run(SharedEngineTarget(llm, chat_tokenizer), PromptStyle.CHAT, prompts, tmp_path / "set")
    two_turns, one_turn = read_back(tmp_path / "set")
    for record, roles in ((two_turns, "system user assistant user assistant"), (one_turn, "user assistant")):
        assert isinstance(record, Conversation)
        assert [message.role.value for message in record.messages] == roles.split()
        answers = [index for index, message in enumerate(record.messages) if message.role is Role.ASSISTANT]
        for index, turn in zip(answers, record.tokens, strict=True):
            assert list(turn.prompt_ids) == encode_prompt(chat_tokenizer, record.messages[:index])
            assert list(turn.completion_ids) == continuation(reference, turn.prompt_ids)
            said = chat_tokenizer.decode(turn.completion_ids, skip_special_tokens=True)
            assert record.messages[index].content == said


def test_raw_text_goes_on_from_its_tokens_up_to_the_stop_string(
    llm: LLM, tokenizer: PreTrainedTokenizerBase, reference: PreTrainedModel
) -> None:
    ids = tokenizer(PROMPTS[0])["input_ids"]
    whole = tokenizer.decode(continuation(reference, ids))
    stop = whole[len(whole) // 2 :][:3]
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": TOKENS, "seed": 0}
    requests = [TextRequest(prompt_ids=tuple(ids), stop=end, **sampling) for end in ("never written", stop)]
    finished: list[WrittenText] = []
    texts = SharedEngineTarget(llm, tokenizer).write(requests, finished.append)
    assert [text.text for text in texts] == [whole, whole.partition(stop)[0]]
    assert [text.ended for text in texts] == [False, True]
    assert texts[0].num_tokens == TOKENS > texts[1].num_tokens
    assert sorted(map(str, finished)) == sorted(map(str, texts))


def test_a_prompt_that_is_too_long_is_a_bad_line_and_a_later_turn_ends_its_dialogue(
    llm: LLM, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    target = SharedEngineTarget(llm, chat_tokenizer)
    long = "word " * 2 * CONTEXT
    turns = [{"role": "user", "content": "def f():"}, {"role": "user", "content": long}]
    prompts = write_lines(tmp_path / "prompts.jsonl", {"messages": turns}, {"prompt": long})
    manifest = run(target, PromptStyle.CHAT, prompts, tmp_path / "set", skip=True)
    assert manifest.counts == Counts(prompts=2, records=1, tokens=TOKENS)
    [record] = read_back(tmp_path / "set")
    assert isinstance(record, Conversation)
    assert len(record.messages) == 2
    prompts = write_lines(tmp_path / "refused.jsonl", {"prompt": long})
    with pytest.raises(BadLineError, match=rf"{prompts}:1: .*maximum context length is {CONTEXT}"):
        run(target, PromptStyle.CHAT, prompts, tmp_path / "refused")


def test_an_unknown_engine_option_is_refused_in_one_line(tokenizer: PreTrainedTokenizerBase) -> None:
    target = OfflineTarget("tiny", tokenizer, {"no_such_option": 1})
    with pytest.raises(ValueError, match=r"engine_args: .*'no_such_option'"), target.running():
        pass
