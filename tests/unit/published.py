# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints in the published layouts of Medusa heads, and a small target for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, VOCAB = 8, 16

State = dict[str, torch.Tensor]


class OriginalBlock(nn.Module):
    """A residual layer with the original repository's parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


def original_module(num_heads: int, num_layers: int, with_lm_heads: bool = True) -> nn.ModuleList:
    """Heads as the original repository builds them: all layers of a head are one module."""
    heads = nn.ModuleList()
    for _ in range(num_heads):
        layers: list[nn.Module] = [OriginalBlock()] * num_layers
        if with_lm_heads:
            layers.append(nn.Linear(HIDDEN, VOCAB, bias=False))
        heads.append(nn.Sequential(*layers))
    return heads


def write_original(
    directory: Path,
    num_heads: int = 3,
    num_layers: int = 1,
    *,
    with_lm_heads: bool = True,
    file: str = "medusa_lm_head.pt",
    dtype: torch.dtype = torch.float16,
    **config: Any,
) -> State:
    """Write what the original repository's training writes; returns the tensors."""
    state = original_module(num_heads, num_layers, with_lm_heads).to(dtype).state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers}
    (directory / "config.json").write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna", **sizes, **config}))
    if file.endswith(".safetensors"):
        save_file({name: tensor.clone() for name, tensor in state.items()}, directory / file)
    else:
        torch.save(state, directory / file)
    return state


def write_target(directory: Path, *, tied: bool = False, vocab_size: int = VOCAB, **save: Any) -> LlamaForCausalLM:
    """Write a random Llama of the heads' sizes."""
    target = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            vocab_size=vocab_size,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    target.save_pretrained(directory, **save)
    return target


def write_medusa2(directory: Path, *, shards: int = 1, pickled: bool = False, with_lm_heads: bool = True) -> State:
    """Write a Medusa-2 checkpoint; each file holds tensors of model and heads. Returns all tensors."""
    write_target(directory)
    (directory / "tokenizer.json").write_text("{}")
    model = load_file(directory / "model.safetensors")
    heads = original_module(3, 1, with_lm_heads).state_dict()
    state = model | {f"medusa_head.{name}": tensor for name, tensor in heads.items()}
    config = json.loads((directory / "config.json").read_text())
    config |= {"medusa_num_heads": 3, "medusa_num_layers": 1, "architectures": ["MedusaLlamaModel"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}" for number in range(shards)]
    if shards == 1:
        files = [f"{stem}.{suffix}"]
    weight_map = {name: files[number % shards] for number, name in enumerate(sorted(state))}
    for file in files:
        part = {name: state[name].clone() for name in weight_map if weight_map[name] == file}
        if pickled:
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file)
    if shards > 1:
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state
