# SPDX-License-Identifier: Apache-2.0
"""Tokenize conversations with the tokenizer's chat template, and label the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.data.records import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag that ``transformers`` looks for in a template that marks the assistant's tokens."""

STAND_INS = ("What is it?", "Explain that.", "1 + 1")
"""Messages that are rendered to see what a template puts around them; they begin with different tokens."""


@dataclass(frozen=True)
class UserTurn:
    """What a chat template puts around what the user says in the first turn.

    Attributes:
        opening_ids: the tokens before it, with a default system message if the template has one. A space at the end is
            left out where it would become part of the first word.
        end: the string that ends it.
        special_tokens: the tokenizer's special tokens, which no user writes.

    """

    opening_ids: tuple[int, ...]
    end: str
    special_tokens: tuple[str, ...]


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``ValueError`` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so it cannot render conversations; "
            "add a chat_template.jinja to the model, or give records of prompt and completion"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the prompt for the assistant's next turn.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.

    """
    require_chat_template(tokenizer)
    return _render(tokenizer, messages, add_generation_prompt=True)["input_ids"]


def user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """Return what the chat template puts around the user's first turn.

    Raises:
        ValueError: there is no chat template, or it opens or ends no user turn.

    """
    require_chat_template(tokenizer)
    messages = [Message(role=Role.USER, content=STAND_INS[0])]
    opening, _, end = _render_text(tokenizer, messages).partition(STAND_INS[0])
    if not end.strip():
        end = _render_text(tokenizer, messages, add_generation_prompt=True).partition(STAND_INS[0])[2]
    for part, verb in ((opening.removeprefix(tokenizer.bos_token or ""), "opens"), (end, "ends")):
        if not part.strip():
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} {verb} no user turn, so the model cannot write what "
                "a user says; give prompts instead of --self-prompts"
            )
    beginnings = [tokenizer(opening + said, add_special_tokens=False)["input_ids"] for said in STAND_INS]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return UserTurn(
        opening_ids=_common_prefix(beginnings),
        end=end.strip(),
        special_tokens=tuple(sorted(special)),
    )


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Sample:
    """Return a conversation's tokens, with labels on what the assistant emits: its text and its end-of-turn token.

    A template with ``{% generation %}`` marks these tokens itself. Any other template is applied twice per turn: to
    the turn's prompt and to the conversation through the turn. The tokens that the second has beyond the first are the
    assistant's, up to the end-of-sequence token if there is one.

    Raises:
        ValueError: there is no chat template, it refuses the messages, or the assistant's tokens cannot be found,
            because the template renders earlier turns differently once more follow.

    """
    require_chat_template(tokenizer)
    if GENERATION_TAG.search(tokenizer.get_chat_template()) and tokenizer.is_fast:
        rendered = _render(tokenizer, messages, return_assistant_tokens_mask=True)
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        if not any(mask):
            raise ValueError("the chat template's {% generation %} marks nothing in this conversation")
    else:
        ids = _render(tokenizer, messages)["input_ids"]
        mask = _mask_by_prefixes(tokenizer, messages, ids)
    return Sample(ids, [token if emitted else IGNORED for token, emitted in zip(ids, mask, strict=True)])


def _mask_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ids: Sequence[int]
) -> list[bool]:
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message.role is not Role.ASSISTANT:
            continue
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)["input_ids"]
        through = _render(tokenizer, messages[: index + 1])["input_ids"]
        if ids[: len(through)] != through or through[: len(prompt)] != prompt:
            raise ValueError(
                f"with this chat template the tokens before message {index + 1} (counted from 1) change with what "
                "follows, so the assistant's tokens are unknown; give a template that marks them by {% generation %}"
            )
        end = len(through)
        if tokenizer.eos_token_id in through[len(prompt) :]:
            end = through.index(tokenizer.eos_token_id, len(prompt)) + 1
        mask[len(prompt) : end] = [True] * (end - len(prompt))
    return mask


def _common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def _render_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    return _apply(tokenizer, messages, tokenize=False, **options)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> Any:
    return _apply(tokenizer, messages, tokenize=True, return_dict=True, **options)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> Any:
    plain = [{"role": message.role.value, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(plain, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from None
