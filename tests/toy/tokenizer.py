# SPDX-License-Identifier: Apache-2.0
"""Train a tokenizer, a byte-level BPE, and cut prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that puts ``<s>`` before each text; once saved, ``AutoTokenizer`` can load it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return each text's token ids between ``<s>`` and ``</s>``."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts))
    return [[*encoding.ids, EOS_ID] for encoding in encodings]


def cut_prompts(documents: Sequence[Sequence[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Cut ``count`` prompts out of documents, evenly spaced and without overlap; their lengths repeat ``lengths``."""
    ids = [token for document in documents for token in document]
    stride = len(ids) // count
    if stride < max(lengths):
        raise ValueError(f"{len(ids)} tokens do not hold {count} prompts of up to {max(lengths)} tokens")
    return [ids[index * stride : index * stride + lengths[index % len(lengths)]] for index in range(count)]
