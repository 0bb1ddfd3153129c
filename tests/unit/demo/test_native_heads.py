# SPDX-License-Identifier: Apache-2.0
"""Heads with a draft vocabulary become heads that stock vLLM reads, and predict the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.evaluated import HEADS, HIDDEN, VOCAB, write_random_heads, write_target
from vllm_medusa.checkpoint.format import TOKEN_MAP, HeadsSpec, read_spec, read_state, write_heads
from vllm_medusa.checkpoint.target import read_lm_head
from vllm_medusa.demo.native_heads import LM_HEAD, native_heads

TOKENS = torch.arange(0, VOCAB, 3)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def write_draft_heads(directory: Path, target: Path, seed: int = 0, shared: bool = True) -> Path:
    generator = torch.Generator().manual_seed(seed)
    spec = HeadsSpec(HIDDEN, VOCAB, HEADS, shared_lm_head=shared, draft_vocab_size=len(TOKENS))
    state = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()}
    lm_heads = {name: read_lm_head(target)[TOKENS] for name in state if name.startswith("lm_heads")}
    return write_heads(directory, spec, state | lm_heads | {TOKEN_MAP: TOKENS})


def test_blocks_stay_and_the_lm_head_is_the_whole_of_the_target_s(target: Path, tmp_path: Path) -> None:
    heads = write_draft_heads(tmp_path / "heads", target)
    derived = native_heads(heads, target, tmp_path)
    assert read_spec(derived) == HeadsSpec(HIDDEN, VOCAB, HEADS, shared_lm_head=True)
    state, before = read_state(derived), read_state(heads)
    torch.testing.assert_close(state.pop(LM_HEAD), read_lm_head(target), rtol=0, atol=0)
    assert state.keys() == before.keys() - {LM_HEAD, TOKEN_MAP}
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_they_are_written_once_for_each_content(target: Path, tmp_path: Path) -> None:
    heads = write_draft_heads(tmp_path / "heads", target)
    first = native_heads(heads, target, tmp_path)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert native_heads(heads, target, tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    write_draft_heads(heads, target, seed=1)
    assert native_heads(heads, target, tmp_path) != first


def test_heads_over_the_whole_vocabulary_are_taken_as_they_are(target: Path, tmp_path: Path) -> None:
    heads = write_random_heads(tmp_path / "heads")
    assert native_heads(heads, target, tmp_path) == heads
    assert list(tmp_path.iterdir()) == [heads]


def test_lm_heads_whose_other_rows_nobody_knows_are_refused(target: Path, tmp_path: Path) -> None:
    heads = write_draft_heads(tmp_path / "heads", target, shared=False)
    with pytest.raises(ValueError, match=f"own ones have {len(TOKENS)} rows; give heads that share"):
        native_heads(heads, target, tmp_path)


def test_heads_of_another_target_are_refused(target: Path, tmp_path: Path) -> None:
    heads = write_draft_heads(tmp_path / "heads", target)
    state = read_state(heads)
    write_heads(heads, read_spec(heads), state | {LM_HEAD: state[LM_HEAD] + 1})
    with pytest.raises(ValueError, match=f"is not that of {target}; give the target"):
        native_heads(heads, target, tmp_path)
