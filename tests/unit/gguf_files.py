# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama in a GGUF file, with quantised weights and a tokenizer, and a wheel that carries it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN = 64
FEED_FORWARD = 96
HEADS = 2
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOKENS = [END, *sorted(ByteLevel.alphabet()), "ab"]


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write a model of one layer, and return its tensors as they are after dequantising, by their names in GGUF."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(TOKENS) - 1)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    values = np.random.default_rng(0)
    kept = {}
    for name, rows, columns in (
        ("token_embd", len(TOKENS), HIDDEN),
        ("blk.0.attn_q", HIDDEN, HIDDEN),
        ("blk.0.attn_k", HIDDEN // HEADS, HIDDEN),
        ("blk.0.attn_v", HIDDEN // HEADS, HIDDEN),
        ("blk.0.attn_output", HIDDEN, HIDDEN),
        ("blk.0.ffn_gate", FEED_FORWARD, HIDDEN),
        ("blk.0.ffn_up", FEED_FORWARD, HIDDEN),
        ("blk.0.ffn_down", HIDDEN, FEED_FORWARD),
    ):
        packed = gguf.quantize(values.standard_normal((rows, columns), np.float32), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        kept[f"{name}.weight"] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        kept[f"{name}.weight"] = values.standard_normal(HIDDEN, np.float32)
        writer.add_tensor(f"{name}.weight", kept[f"{name}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def write_wheel(directory: Path, file: Path) -> Path:
    """Write the wheel of a package ``tiny-model`` 1.0 that holds ``file`` as ``tiny_model/model.gguf``."""
    directory.mkdir(exist_ok=True)
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_model/model.gguf")
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel
