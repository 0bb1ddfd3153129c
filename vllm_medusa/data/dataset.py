# SPDX-License-Identifier: Apache-2.0
"""Turn files of records into the blocks that heads are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_medusa.data.chat import encode_conversation
from vllm_medusa.data.packing import IGNORED, Sample, pack_samples
from vllm_medusa.data.record_files import BadLineCounter, BadLines, read_records
from vllm_medusa.data.records import Completion, Record, Text, TurnTokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_blocks(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int, bad_lines: BadLines) -> Dataset:
    """Read, tokenize and pack training files (see ``pack_samples``).

    The data set is held in memory (8 bytes per token). Nothing is written to the cache of ``datasets``.

    Args:
        files: files or directories, as ``parsed_lines`` reads them.
        tokenizer: the target's.
        length: tokens per block.
        bad_lines: whether a bad line raises or is skipped; the number of skipped lines is logged.

    Returns:
        Columns ``input_ids`` and ``labels``: lists of ``length`` integers. A label is the token's id or ``IGNORED``.

    Raises:
        ValueError: a line is bad and bad lines are refused, or all lines are bad.
        OSError: a file cannot be read.

    """
    counter = BadLineCounter(bad_lines)
    padding_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    blocks = [
        np.array([block.input_ids, block.labels], dtype=np.int32)  # [2, length]
        for block in pack_samples(read_samples(files, tokenizer, counter), length, padding_id or 0)
    ]
    counter.report()
    if not blocks:
        reason = f": {counter.first}" if counter.first else ""
        raise ValueError(f"nothing to train on in {', '.join(map(str, files)) or 'no files'}{reason}")
    return _dataset([block[0] for block in blocks], [block[1] for block in blocks])


def label_all(blocks: Dataset) -> Dataset:
    """Return blocks of ``load_blocks`` with labels on all tokens up to a block's last label; behind it is padding."""
    arrays = blocks.with_format("numpy")[:]
    ids, labelled = arrays["input_ids"], arrays["labels"] != IGNORED
    to_last = np.flip(np.maximum.accumulate(np.flip(labelled, axis=1), axis=1), axis=1)
    return _dataset(list(ids), list(np.where(to_last, ids, IGNORED)))


def encode_record(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[Sample]:
    """Return a record's tokens and labels.

    All tokens of a text have labels. Of a completion, the tokens after the prompt have labels, beginning with the first
    one that differs from the prompt's own tokens. Conversations are rendered by the chat template (see
    ``encode_conversation``). If a record holds token ids, these are used instead of its text.

    Returns:
        One sample; several if a turn's recorded prompt does not begin with the tokens of the turn before, as happens
        when earlier answers are tokenized again.

    Raises:
        ValueError: the chat template is missing or refuses the record, or a token id is not in the vocabulary.

    """
    if isinstance(record, Text):
        ids = tokenizer(record.text)["input_ids"]
        return [Sample(ids, ids)]
    if record.tokens:
        return _encode_tokens(record.tokens, len(tokenizer))
    if isinstance(record, Completion):
        return [_encode_completion(tokenizer, record)]
    return [encode_conversation(tokenizer, record.messages)]


def read_samples(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, bad_lines: BadLineCounter
) -> Iterator[Sample]:
    """Read records one by one as samples; raises as ``parsed_lines``. A record that cannot be encoded is a bad line."""
    for source, record in read_records(files, bad_lines):
        try:
            samples = encode_record(tokenizer, record)
        except ValueError as error:
            bad_lines.add(source, error)
        else:
            yield from samples


def _dataset(input_ids: list[np.ndarray], labels: list[np.ndarray]) -> Dataset:
    """Return blocks of their token ids and labels, ``[length]`` each."""
    import datasets

    column = datasets.List(datasets.Value("int32"), length=len(input_ids[0]))
    return datasets.Dataset.from_dict(
        {"input_ids": input_ids, "labels": labels},
        features=datasets.Features({"input_ids": column, "labels": column}),
    )


def _encode_completion(tokenizer: PreTrainedTokenizerBase, record: Completion) -> Sample:
    prompt = tokenizer(record.prompt)["input_ids"]
    ids = tokenizer(record.prompt + record.completion)["input_ids"]
    border = _shared_length(prompt, ids)
    return Sample(ids, [IGNORED] * border + ids[border:])


def _encode_tokens(turns: Sequence[TurnTokens], vocab_size: int) -> list[Sample]:
    samples: list[Sample] = []
    for turn in turns:
        prompt, completion = list(turn.prompt_ids), list(turn.completion_ids)
        largest = max(prompt + completion)
        if largest >= vocab_size:
            raise ValueError(
                f"token id {largest} is not one of the tokenizer's {vocab_size}; give the tokenizer of the model "
                "that wrote the record"
            )
        labels: list[int] = []
        if samples and prompt[: len(samples[-1])] == samples[-1].input_ids:
            labels.extend(samples.pop().labels)
        labels.extend([IGNORED] * (len(prompt) - len(labels)))
        samples.append(Sample(prompt + completion, labels + completion))
    return samples


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    differing = (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(first), len(second)))
