# SPDX-License-Identifier: Apache-2.0
"""The models that are measured, and what a step has to do with them.

What is counted is the least: each weight and each key and value read once, and the operations of all products.
Activations, which are small, and the embeddings' few rows are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from gpu_bench.roofline import Work


def itemsize(dtype: str) -> int:
    """Return the bytes of a number, by torch's name of its type."""
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found.itemsize


@dataclass(frozen=True)
class AttentionShape:
    """An attention layer.

    Attributes:
        name: what a table calls it.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: numbers per head.
        dtype: of queries and output.
        cache_dtype: of keys and values in the cache.

    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"

    @property
    def slot_bytes(self) -> int:
        """Bytes of a token's key and value."""
        return 2 * self.kv_heads * self.head_dim * itemsize(self.cache_dtype)

    def work(self, requests: int, rows: int, context: int, own_pairs: int, products: str | None = None) -> Work:
        """Return what a step of this layer has to do.

        Args:
            requests: those that decode.
            rows: of each.
            context: keys that all rows of a request see.
            own_pairs: of a request, how many pairs of a row and a row that it sees, itself included.
            products: the dtype in which scores are taken; ``dtype`` by default.

        """
        tokens, numbers = requests * rows, self.heads * self.head_dim
        cached = requests * (context + rows) * self.slot_bytes
        pairs = requests * (rows * context + own_pairs)
        return Work(
            bytes=cached + 2 * tokens * numbers * itemsize(self.dtype),
            operations=4 * numbers * pairs,
            dtype=products or self.dtype,
        )


@dataclass(frozen=True)
class Target:
    """A Llama.

    Attributes:
        hidden: width of a hidden state.
        intermediate: width of the feed-forward.
        layers: decoder layers.
        vocab: tokens.
        attention: each layer's attention.

    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    attention: AttentionShape

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's products."""
        shape = self.attention
        projections = 2 * self.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
        return projections + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All weights."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_parameters + 2 * self.vocab * self.hidden + norms

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * itemsize(self.attention.dtype)

    def work(self, requests: int, rows: int, context: int) -> list[Work]:
        """Return the stages of a step in which so many requests have so many rows each, after that context.

        Of the rows of a tree, whatever its shape, each sees at least itself.
        """
        tokens = requests * rows
        attention = self.attention.work(requests, rows, context, own_pairs=rows)
        return [
            self._products(self.layers * self.layer_parameters, tokens),
            Work(self.layers * attention.bytes, self.layers * attention.operations, attention.dtype),
            self._products(self.vocab * self.hidden, tokens),
        ]

    def config(self) -> dict[str, Any]:
        """Return ``LlamaConfig``'s arguments."""
        shape = self.attention
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": 1 << 17,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
            "dtype": shape.dtype,
        }

    @classmethod
    def of(cls, directory: Path, dtype: str) -> Self:
        """Read a checkpoint's sizes.

        Raises:
            ValueError: it is no Llama.

        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory)
        if config.model_type != "llama":
            raise ValueError(f"--target: {directory} holds a model of type {config.model_type!r}; give a Llama")
        shape = AttentionShape(
            directory.name,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype,
            dtype,
        )
        sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
        return cls(*sizes, attention=shape)

    def _products(self, parameters: int, tokens: int) -> Work:
        dtype = self.attention.dtype
        return Work(parameters * itemsize(dtype), 2 * parameters * tokens, dtype)


@dataclass(frozen=True)
class Heads:
    """Medusa heads.

    Attributes:
        hidden: the target's width.
        vocab: tokens that they can draft.
        layers: residual layers of each.
        shared: whether their LM head is the target's.
        dtype: of their weights.

    """

    hidden: int
    vocab: int
    layers: int
    shared: bool
    dtype: str

    def work(self, requests: int, depth: int) -> list[Work]:
        """Return the stages of a proposal for so many requests by the heads of a tree of that depth."""
        blocks = depth * self.layers * self.hidden**2
        each = self.vocab * self.hidden
        size = itemsize(self.dtype)
        return [
            Work(size * blocks, 2 * requests * blocks, self.dtype),
            Work(size * (each if self.shared else depth * each), 2 * requests * depth * each, self.dtype),
        ]

    @staticmethod
    def number_in(directory: Path) -> int:
        """Read how many heads a checkpoint holds."""
        stored = json.loads((directory / "config.json").read_text())
        return int(stored.get("num_heads") or stored["medusa_num_heads"])

    @classmethod
    def of(cls, directory: Path, target: Target) -> Self:
        """Read a checkpoint's sizes."""
        stored = json.loads((directory / "config.json").read_text())
        return cls(
            hidden=target.hidden,
            vocab=stored.get("truncated_vocab_size") or target.vocab,
            layers=stored.get("num_hidden_layers", stored.get("medusa_num_layers", 1)),
            shared=bool(stored.get("original_lm_head", False)),
            dtype=target.attention.dtype,
        )


def write_target(directory: Path, target: Target) -> Path:
    """Write a target's configuration; its weights are made up at loading."""
    from transformers import LlamaConfig

    LlamaConfig(**target.config()).save_pretrained(directory)
    return directory


def write_heads(directory: Path, heads: Heads, num_heads: int, target_vocab: int) -> Path:
    """Write heads' configuration; their weights are made up at loading."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "hidden_size": heads.hidden,
        "vocab_size": target_vocab,
        "truncated_vocab_size": heads.vocab,
        "num_heads": num_heads,
        "num_hidden_layers": heads.layers,
        "original_lm_head": heads.shared,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory
