# SPDX-License-Identifier: Apache-2.0
"""Heads with a draft vocabulary become heads that stock vLLM reads, and predict the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.evaluated import HEADS, HIDDEN, VOCAB, write_random_heads, write_target
from vllm_medusa.checkpoint.format import TOKEN_MAP, HeadsSpec, read_spec, read_state, write_heads
from vllm_medusa.demo.native_heads import native_heads

TOKENS = torch.arange(0, VOCAB, 3)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def write_draft_heads(directory: Path, seed: int = 0, shared: bool = True) -> Path:
    generator = torch.Generator().manual_seed(seed)
    spec = HeadsSpec(HIDDEN, VOCAB, HEADS, shared_lm_head=shared, draft_vocab_size=len(TOKENS))
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()}
    return write_heads(directory, spec, state | {TOKEN_MAP: TOKENS})


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_stay_and_lm_heads_have_zeros_for_tokens_that_cannot_be_drafted(
    target: Path, tmp_path: Path, shared: bool
) -> None:
    heads = write_draft_heads(tmp_path / "heads", shared=shared)
    derived = native_heads(heads, target, tmp_path)
    assert read_spec(derived) == HeadsSpec(HIDDEN, VOCAB, HEADS, shared_lm_head=shared)
    state, before = read_state(derived), read_state(heads)
    assert state.keys() == before.keys() - {TOKEN_MAP}
    others = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, TOKENS, False)
    for name, tensor in state.items():
        if name.startswith("lm_heads."):
            assert torch.equal(tensor[TOKENS], before[name])
            assert not tensor[others].any()
        else:
            assert torch.equal(tensor, before[name])


def test_they_are_written_once_for_each_content(target: Path, tmp_path: Path) -> None:
    heads = write_draft_heads(tmp_path / "heads")
    first = native_heads(heads, target, tmp_path)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert native_heads(heads, target, tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    write_draft_heads(heads, seed=1)
    assert native_heads(heads, target, tmp_path) != first


def test_heads_over_the_whole_vocabulary_are_taken_as_they_are(target: Path, tmp_path: Path) -> None:
    heads = write_random_heads(tmp_path / "heads")
    assert native_heads(heads, target, tmp_path) == heads
    assert list(tmp_path.iterdir()) == [heads]


def test_heads_of_another_target_are_refused(target: Path, tmp_path: Path) -> None:
    spec = HeadsSpec(HIDDEN, VOCAB + 1, HEADS, shared_lm_head=True, draft_vocab_size=len(TOKENS))
    state = {name: torch.zeros(shape) for name, shape in spec.shapes().items()}
    heads = write_heads(tmp_path / "heads", spec, state | {TOKEN_MAP: TOKENS})
    with pytest.raises(ValueError, match=f"vocab_size {VOCAB + 1}, the target in .* has {VOCAB}; give the target"):
        native_heads(heads, target, tmp_path)
