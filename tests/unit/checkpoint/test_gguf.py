# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.gguf_files import CHAT_TEMPLATE, write_gguf
from vllm_medusa.checkpoint.gguf import ORIGIN_FILE, dequantise

NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "output_norm": "model.norm",
}
"""Tensors whose rows GGUF does not permute."""


def test_a_quantised_model_becomes_a_plain_one_in_bf16(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    dequantise(tmp_path / "tiny.gguf", tmp_path / "model", {"source": "tiny"})
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    state = model.state_dict()
    for packed, plain in NAMES.items():
        expected = torch.from_numpy(tensors[f"{packed}.weight"]).to(torch.bfloat16)
        torch.testing.assert_close(state[f"{plain}.weight"], expected, rtol=0, atol=0)
    assert model.config.tie_word_embeddings
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert json.loads((tmp_path / "model" / ORIGIN_FILE).read_text()).keys() == {"source", "versions"}


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    dequantise(tmp_path / "tiny.gguf", tmp_path / "model", {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("a b\n").input_ids) == "a b\n"
    assert tokenizer.eos_token_id == 0
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"PK")
    with pytest.raises(ValueError, match="does not start with the letters GGUF"):
        dequantise(tmp_path / "other.gguf", tmp_path / "model", {})
    write_gguf(tmp_path / "unknown.gguf", architecture="clip")
    with pytest.raises(ValueError, match="clip"):
        dequantise(tmp_path / "unknown.gguf", tmp_path / "model", {})
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(2))
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read"):
        dequantise(tmp_path / "cut.gguf", tmp_path / "model", {})
    assert not (tmp_path / "model").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == "gguf" else package)
    with pytest.raises(ValueError, match=r"need gguf, which is not installed; install vllm-medusa\[train\]"):
        dequantise(tmp_path / "tiny.gguf", tmp_path / "model", {})
