# SPDX-License-Identifier: Apache-2.0
"""What the engine tests' target is trained on, and how."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.toy.corpus import load_corpus, strip_prose
from tests.toy.muon import orthogonalise
from tests.toy.tokenizer import EOS_ID, cut_prompts, encode_documents, train_tokenizer


def test_the_corpus_is_the_same_each_time_and_held_out_files_are_apart() -> None:
    corpus = load_corpus(50_000, 20_000)
    assert corpus == load_corpus(50_000, 20_000)
    assert sum(map(len, corpus.training)) >= 50_000
    assert sum(map(len, corpus.held_out)) >= 20_000
    assert not set(corpus.training) & set(corpus.held_out)
    assert load_corpus(0, 20_000) == type(corpus)((), corpus.held_out)


def test_code_keeps_its_meaning_without_prose() -> None:
    stripped = strip_prose('"""A."""\n\ndef f(x):\n    "B."  # C\n    return "D."\n\nclass E:\n    """F."""\n')
    assert stripped == "def f(x):\n    return 'D.'\n\nclass E:\n    pass"
    ast.parse(stripped)


def test_a_saved_tokenizer_is_loaded_by_name(tmp_path: Path) -> None:
    text = "def f(x):\n    return x + 1\n"
    tokenizer = train_tokenizer([text], vocab_size=280)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    ids = loaded(text).input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert encode_documents(tokenizer, [text]) == [[*ids, EOS_ID]]
    assert ids[0] == loaded.bos_token_id


def test_prompts_do_not_overlap() -> None:
    prompts = cut_prompts([range(50), range(50, 100)], lengths=[3, 10], count=8)
    assert [len(prompt) for prompt in prompts] == [3, 10] * 4
    tokens = [token for prompt in prompts for token in prompt]
    assert len(tokens) == len(set(tokens))
    with pytest.raises(ValueError, match="do not hold"):
        cut_prompts([range(50)], lengths=[10], count=6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_updates_become_orthogonal(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.max() < 1.3
    assert values.median() > 0.6
