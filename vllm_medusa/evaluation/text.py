# SPDX-License-Identifier: Apache-2.0
"""The held-out text on which heads are measured: the target's continuations of prompts, or given records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_medusa.data.chat import encode_prompt
from vllm_medusa.data.dataset import read_samples
from vllm_medusa.data.packing import Sample
from vllm_medusa.data.prompts import Prompt, read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.distillation.continuation import continue_prompts
from vllm_medusa.distillation.dialogue import PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sources:
    """Where the text comes from: either prompts or data.

    Attributes:
        prompts: files of prompts, or of conversations, of which only the user's first message is answered.
        data: files of records that the target wrote.
        style: how the target is asked; by default in its chat template if it has one.
        bad_lines: whether bad lines are refused or skipped.
        new_tokens: the longest continuation of a prompt.
        max_length: the longest text, including the prompt; the target's own limit also holds. Longer data is cut.
            A prompt that leaves no room for ``new_tokens`` is a bad line.

    Raises:
        ValueError: both or neither are given, or there is no room for a prompt.

    """

    prompts: tuple[Path, ...]
    data: tuple[Path, ...]
    style: PromptStyle | None
    bad_lines: BadLines
    new_tokens: int
    max_length: int

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.data):
            raise ValueError("give either --prompts, which the target continues, or --data that it has written")
        if self.prompts and self.new_tokens >= self.max_length:
            raise ValueError(f"new_tokens must be less than max_length ({self.max_length}), got {self.new_tokens}")


def held_out_samples(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sources, batch_size: int
) -> list[Sample]:
    """Read the text, or let the target write it.

    Raises:
        ValueError: a line is bad and bad lines are refused, all lines are bad, or the chat template is missing.
        OSError: a file cannot be read.

    """
    limit = getattr(target.config.get_text_config(), "max_position_embeddings", None) or sources.max_length
    max_length = min(sources.max_length, limit)
    bad_lines = BadLineCounter(sources.bad_lines)
    if sources.data:
        samples = [
            Sample(sample.input_ids[:max_length], sample.labels[:max_length])
            for sample in read_samples(sources.data, tokenizer, bad_lines)
        ]
    else:
        room = max_length - sources.new_tokens
        prompts = list(_encoded_prompts(sources, tokenizer, room, bad_lines))
        samples = continue_prompts(target, prompts, sources.new_tokens, batch_size)
    bad_lines.report()
    if not samples:
        files = ", ".join(map(str, sources.prompts or sources.data))
        raise ValueError(f"no valid line in {files}" + (f": {bad_lines.first}" if bad_lines.first else ""))
    return samples


def _encoded_prompts(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, room: int, bad_lines: BadLineCounter
) -> Iterator[list[int]]:
    style = sources.style or (PromptStyle.CHAT if tokenizer.chat_template else PromptStyle.COMPLETION)
    for source, prompt in read_prompts(sources.prompts, bad_lines):
        try:
            ids = _encode(prompt, style, tokenizer)
            if not 0 < len(ids) <= room:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens, but new_tokens {sources.new_tokens} leaves room for {room}"
                )
        except ValueError as error:
            bad_lines.add(source, error)
        else:
            yield ids


def _encode(prompt: Prompt, style: PromptStyle, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if style is PromptStyle.COMPLETION:
        return tokenizer(prompt.first_user_message.content)["input_ids"]
    return encode_prompt(tokenizer, prompt.messages[: prompt.messages.index(prompt.first_user_message) + 1])
