# SPDX-License-Identifier: Apache-2.0
"""The chat templates are shortened ones of well-known models; the tokenizer is trained here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.toy.tokenizer import train_tokenizer
from tests.unit.strategies import deterministic
from vllm_medusa.data.chat import encode_conversation, encode_prompt, user_turn
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.data.records import Message, Role


@dataclass(frozen=True)
class Template:
    """A chat template, and what it writes after an answer."""

    jinja: str
    end_of_turn: str


CHATML = Template(
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
)
CHATML_MARKED = Template(
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
)
LLAMA_2 = Template(
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate\nuser/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first %}{{ system }}{% endif %}"
    "{{ message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
    " </s>",
)
VICUNA = Template(
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "</s>",
)
VICUNA_MARKED = Template(
    VICUNA.jinja.replace(
        "{{ 'ASSISTANT: ' + message['content'] + eos_token }}",
        "ASSISTANT:{% generation %}{{ ' ' + message['content'] + eos_token }}{%- endgeneration -%}",
    ),
    "</s>",
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML marked": CHATML_MARKED,
    "Llama 2": LLAMA_2,
    "Vicuna": VICUNA,
    "Vicuna marked": VICUNA_MARKED,
}

SYSTEM = "Be brief, and say so."
TURNS = ("What is a tree?", "A graph without cycles.", "And a forest?\n", "Trees: several of them, {é} apart!")


@pytest.fixture(scope="module")
def vocabulary() -> PreTrainedTokenizerFast:
    texts = [
        SYSTEM,
        *TURNS,
        "[INST] What USER: Explain",
        "user assistant system USER: ASSISTANT: [INST] [/INST] <<SYS>> <</SYS>>",
    ] * 3
    tokenizer = train_tokenizer(texts, vocab_size=400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def using(vocabulary: PreTrainedTokenizerFast, template: Template) -> PreTrainedTokenizerFast:
    vocabulary.chat_template = template.jinja
    vocabulary.eos_token = template.end_of_turn.strip()
    return vocabulary


def conversation(turns: tuple[str, ...] = TURNS, system: str | None = None) -> list[Message]:
    roles = [Role.USER, Role.ASSISTANT] * len(turns)
    said = [Message(role=role, content=turn) for role, turn in zip(roles, turns, strict=False)]
    return [Message(role=Role.SYSTEM, content=system), *said] if system else said


def learnt_stretches(labels: list[int]) -> list[list[int]]:
    """Return the runs of labels between ignored ones."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["no system prompt", "system prompt"])
@pytest.mark.parametrize("turns", [TURNS[:2], TURNS, TURNS[:3]], ids=["one turn", "two turns", "a question left open"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_exactly_what_the_assistant_emits_is_learnt(
    vocabulary: PreTrainedTokenizerFast, template: Template, turns: tuple[str, ...], system: str | None
):
    tokenizer = using(vocabulary, template)
    messages = conversation(turns, system)
    sample = encode_conversation(tokenizer, messages)
    plain = [{"role": message.role.value, "content": message.content} for message in messages]
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(plain, tokenize=False)
    assert {label for label, token in zip(sample.labels, sample.input_ids, strict=True) if label != token} == {IGNORED}
    spoken = [tokenizer.decode(stretch) for stretch in learnt_stretches(list(sample.labels))]
    space = "" if template.end_of_turn == "<|im_end|>" else " "
    assert spoken == [
        f"{space}{message.content}{template.end_of_turn}" for message in messages if message.role is Role.ASSISTANT
    ]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_learnt_follows_the_prompt_that_the_target_is_given(
    vocabulary: PreTrainedTokenizerFast, template: Template
):
    tokenizer = using(vocabulary, template)
    messages = conversation(system=SYSTEM)
    sample = encode_conversation(tokenizer, messages)
    for end in (2, 4):
        prompt = encode_prompt(tokenizer, messages[:end])
        assert sample.input_ids[: len(prompt)] == prompt
        assert sample.labels[len(prompt) - 1] == IGNORED
        assert sample.labels[len(prompt)] != IGNORED


def test_marked_and_unmarked_templates_agree(vocabulary: PreTrainedTokenizerFast):
    for unmarked, marked in ((CHATML, CHATML_MARKED), (VICUNA, VICUNA_MARKED)):
        samples = [
            encode_conversation(using(vocabulary, each), conversation(system=SYSTEM)) for each in (unmarked, marked)
        ]
        assert samples[0] == samples[1]


WORDS = st.text(min_size=1, max_size=12).filter(lambda text: text == text.strip() and "<|" not in text)


@deterministic
@given(turns=st.lists(WORDS, min_size=2, max_size=5), template=st.sampled_from(list(TEMPLATES.values())))
def test_whatever_is_said_exactly_the_assistant_s_part_is_learnt(
    vocabulary: PreTrainedTokenizerFast, turns: list[str], template: Template
):
    tokenizer = using(vocabulary, template)
    sample = encode_conversation(tokenizer, conversation(tuple(turns)))
    space = "" if template.end_of_turn == "<|im_end|>" else " "
    spoken = [tokenizer.decode(stretch) for stretch in learnt_stretches(list(sample.labels))]
    assert spoken == [f"{space}{turn}{template.end_of_turn}" for turn in turns[1::2]]


def refused(tokenizer: PreTrainedTokenizerFast, messages: list[Message], reason: str):
    with pytest.raises(ValueError, match=reason) as error:
        encode_conversation(tokenizer, messages)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_chat_template_is_refused(vocabulary: PreTrainedTokenizerFast):
    vocabulary.chat_template = None
    refused(vocabulary, conversation(), "has no chat template")
    with pytest.raises(ValueError, match="has no chat template"):
        encode_prompt(vocabulary, conversation()[:1])


def test_what_the_template_refuses_is_refused_in_one_line(vocabulary: PreTrainedTokenizerFast):
    tokenizer = using(vocabulary, LLAMA_2)
    refused(
        tokenizer,
        conversation()[1:],
        "the chat template refuses the messages: Conversation roles must alternate user/assistant",
    )


def test_a_template_that_renders_former_turns_anew_is_refused(vocabulary: PreTrainedTokenizerFast):
    thinking = Template(
        CHATML.jinja.replace(
            "{{ message['content'] }}",
            "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}",
        ),
        "<|im_end|>",
    )
    tokenizer = using(vocabulary, thinking)
    assert IGNORED in encode_conversation(tokenizer, conversation(TURNS[:2])).labels
    refused(
        tokenizer, conversation(), r"the tokens before message 2 .* change .* give a template that marks them by {% gen"
    )


def test_a_template_whose_prompt_the_answer_does_not_continue_is_refused(vocabulary: PreTrainedTokenizerFast):
    other = Template(CHATML.jinja.replace("<|im_start|>assistant\n", "<|im_start|>model\n"), "<|im_end|>")
    refused(using(vocabulary, other), conversation(), "the tokens before message 2")


def test_a_template_that_marks_nothing_is_refused(vocabulary: PreTrainedTokenizerFast):
    empty = Template(CHATML.jinja + "{% generation %}{% endgeneration %}", "<|im_end|>")
    refused(using(vocabulary, empty), conversation(), "marks nothing")


@pytest.mark.parametrize(
    ("template", "opening", "end"),
    [
        (CHATML, "<|im_start|>user\n", "<|im_end|>"),
        (LLAMA_2, "<s>[INST]", "[/INST]"),
        (VICUNA, "<s>USER:", "ASSISTANT:"),
    ],
    ids=["ChatML", "Llama 2", "Vicuna"],
)
def test_what_stands_around_a_user_turn_is_found(
    vocabulary: PreTrainedTokenizerFast, template: Template, opening: str, end: str
):
    turn = user_turn(using(vocabulary, template))
    assert vocabulary.decode(turn.opening_ids) == opening
    assert turn.end == end
    assert set(turn.special_tokens) == {"<s>", "</s>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        (
            "{{ bos_token }}{{ messages[0]['content'] }}</s>",
            "opens no user turn, so the model cannot write what a user says",
        ),
        ("{{ bos_token }}Q: {{ messages[0]['content'] }}", "ends no user turn"),
        ("{{ bos_token }}nothing of what is said", "ends no user turn"),
    ],
)
def test_a_template_around_no_user_turn_is_refused(vocabulary: PreTrainedTokenizerFast, jinja: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        user_turn(using(vocabulary, Template(jinja, "")))
