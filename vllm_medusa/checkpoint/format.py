# SPDX-License-Identifier: Apache-2.0
"""The heads' checkpoint: a directory in vLLM 0.32's format for the method "medusa"."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_medusa.checkpoint.entries import check_entries, read_entries
from vllm_medusa.checkpoint.weight_files import WeightFile
from vllm_medusa.files import replaced_directory, write_json
from vllm_medusa.messages import shortened, some_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

TOKEN_MAP = "token_map"
"""The tensor ``[draft_vocab_size]`` of integers that names the target's token of each row of the heads' LM heads."""

PATH_RANK = "sequential_path_rank"
"""The entry of ``config.json`` that only sequentially dependent heads have (Hydra, arXiv 2402.05109)."""

NORM_EPS = 1e-10
"""Of the input embeddings that sequential heads read: far below their mean square, so that a model's own scale of its
embeddings changes nothing."""

TO_CONVERT = "convert published heads with vllm-medusa convert"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of heads that are served as they are; numbers of other dtypes would mean nothing without their scales."""


@dataclass(frozen=True)
class HeadsSpec:
    """The sizes of a set of Medusa heads.

    Attributes:
        hidden_size: width of the target's hidden state after its final norm.
        vocab_size: the target's vocabulary size.
        num_heads: number of heads, which is also the depth of the deepest drafted token.
        num_layers: residual layers ``x + SiLU(Linear(x))`` per head.
        fc_bias: whether those linear layers have a bias.
        shared_lm_head: whether all heads use one copy of the target's LM head instead of one LM head each.
        draft_vocab_size: tokens that the heads can draft, the rows of their LM heads, fewer than ``vocab_size``; the
            tensor ``token_map`` says which tokens these are. None: all.
        path_rank: rank of the layers through which heads read the path to the node that they continue (see
            ``training.paths``). None: plain Medusa heads, which read the hidden state alone.

    Raises:
        ValueError: a size is not a positive integer, or the draft vocabulary is not smaller than the vocabulary.

    """

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_layers: int = 1
    fc_bias: bool = True
    shared_lm_head: bool = False
    draft_vocab_size: int | None = None
    path_rank: int | None = None

    def __post_init__(self) -> None:
        optional = () if self.path_rank is None else ("path_rank",)
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers", *optional):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.draft_vocab_size is not None and not 0 < self.draft_vocab_size < self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be within 1..{self.vocab_size - 1} (the target has {self.vocab_size} tokens), "
                f"got {self.draft_vocab_size}; leave it out to draft all tokens"
            )

    @property
    def lm_head_rows(self) -> int:
        """Tokens that the heads can draft."""
        return self.draft_vocab_size or self.vocab_size

    def to_config(self) -> dict[str, Any]:
        """Return the entries of ``config.json``, under vLLM's names."""
        sequential = {} if self.path_rank is None else {PATH_RANK: self.path_rank}
        return {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "truncated_vocab_size": self.lm_head_rows,
            "num_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "medusa_fc_bias": self.fc_bias,
            "original_lm_head": self.shared_lm_head,
            **sequential,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HeadsSpec:
        """Read the entries of a ``config.json``; optional ones have vLLM's defaults.

        Raises:
            ValueError: an entry is missing or wrong.

        """
        missing = [key for key in ("hidden_size", "vocab_size", "num_heads") if key not in config]
        if missing:
            raise ValueError(f"the heads' config lacks {', '.join(missing)}; {TO_CONVERT}")
        check_entries(dict(config), "the heads' config")
        if config.get("model_type", "medusa") != "medusa":
            raise ValueError(
                f'the heads\' model_type must be "medusa", got {shortened(config["model_type"])}; {TO_CONVERT}'
            )
        vocab_size = config["vocab_size"]
        truncated = config.get("truncated_vocab_size") or vocab_size
        if truncated > vocab_size:
            raise ValueError(
                f"truncated_vocab_size must be at most vocab_size ({vocab_size}), got {truncated}; correct config.json"
            )
        return cls(
            hidden_size=config["hidden_size"],
            vocab_size=vocab_size,
            num_heads=config["num_heads"],
            num_layers=config.get("num_hidden_layers", 1),
            fc_bias=bool(config.get("medusa_fc_bias", False)),
            shared_lm_head=bool(config.get("original_lm_head", False)),
            draft_vocab_size=None if truncated == vocab_size else truncated,
            path_rank=config.get(PATH_RANK),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor; vLLM expects a shared LM head under the name of head 0's."""
        shapes: dict[str, tuple[int, ...]] = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                shapes[f"blocks.{head}.layers.{layer}.weight"] = (self.hidden_size, self.hidden_size)
                if self.fc_bias:
                    shapes[f"blocks.{head}.layers.{layer}.bias"] = (self.hidden_size,)
            if self.path_rank is not None:
                shapes |= path_shapes(head, self.hidden_size, self.path_rank)
        for head in range(1 if self.shared_lm_head else self.num_heads):
            shapes[f"lm_heads.{head}.weight"] = (self.lm_head_rows, self.hidden_size)
        if self.draft_vocab_size is not None:
            shapes[TOKEN_MAP] = (self.draft_vocab_size,)
        return shapes

    def validate(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ``ValueError`` if tensors are missing, unknown, of another shape, or of a wrong dtype or content."""
        shapes = self.shapes()
        if missing := sorted(shapes.keys() - state.keys()):
            raise ValueError(f"the heads' weights lack {some_of(missing)}")
        if unknown := sorted(state.keys() - shapes.keys()):
            raise ValueError(f"the heads' weights hold unknown tensors: {some_of(unknown)}")
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(state[name].shape)}")
            if name != TOKEN_MAP:
                check_dtype(name, state[name])
        if self.draft_vocab_size is not None:
            self.check_token_map(state[TOKEN_MAP])

    def check_token_map(self, token_map: torch.Tensor) -> None:
        """Raise ``ValueError`` unless it names a different token of the target for each row of the LM heads."""
        rows = self.lm_head_rows
        if token_map.is_floating_point() or token_map.dtype is torch.bool:
            raise ValueError(f"{TOKEN_MAP} is of dtype {dtype_name(token_map)}; it must hold integers")
        if tuple(token_map.shape) != (rows,):
            raise ValueError(f"{TOKEN_MAP} must have shape {(rows,)}, got {tuple(token_map.shape)}")
        of_target = bool(((token_map >= 0) & (token_map < self.vocab_size)).all())
        if not of_target or len(token_map.unique()) < rows:
            raise ValueError(
                f"{TOKEN_MAP} holds {token_map[:3].tolist()}...; it must hold {rows} different tokens of the target's "
                f"{self.vocab_size}"
            )


def path_shapes(head: int, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor with which a head, counted from 0, reads a path."""
    shapes: dict[str, tuple[int, ...]] = {
        f"paths.{head}.down.weight": (rank, hidden_size),
        f"paths.{head}.down.bias": (rank,),
        f"paths.{head}.up.weight": (hidden_size, rank),
    }
    return shapes | {f"paths.{head}.tokens.{place}.weight": (rank, hidden_size) for place in range(head + 1)}


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` if a tensor of heads is quantised or otherwise not in floating point."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is of dtype {dtype_name(tensor)}; heads must be float32, float16 or bfloat16, "
            "save them unquantised"
        )


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_heads(
    directory: str | os.PathLike[str],
    spec: HeadsSpec,
    state_dict: Mapping[str, torch.Tensor],
    extra_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; a reader sees the directory's old content or the complete new one.

    Args:
        directory: where the checkpoint goes; its former content is replaced.
        spec: the heads' sizes.
        state_dict: the tensors that ``spec.shapes()`` names.
        extra_config: further entries for ``config.json``.

    Returns:
        The directory.

    Raises:
        ValueError: the tensors do not fit ``spec``, or vLLM would read an extra entry as a size.

    """
    spec.validate(state_dict)
    config = spec.to_config()
    extra = dict(extra_config or {})
    if clashes := [key for key in extra if key in config or is_read_as_size(key)]:
        raise ValueError(f"extra_config may not hold {', '.join(clashes)}: vLLM reads the heads' sizes from such names")
    with replaced_directory(directory) as temporary:
        write_json(temporary / CONFIG_FILE, config | extra)
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state_dict.items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    return Path(directory)


def is_read_as_size(key: str) -> bool:
    """Whether vLLM 0.32 takes a key of ``config.json`` for ``num_heads`` or ``num_hidden_layers``."""
    return "num" in key and ("heads" in key or "layers" in key)


def read_spec(directory: str | os.PathLike[str]) -> HeadsSpec:
    """Read the heads' sizes from a checkpoint; raises ``ValueError`` naming its config, ``OSError`` if it has none."""
    path = Path(directory) / CONFIG_FILE
    entries = read_entries(path)
    try:
        return HeadsSpec.from_config(entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_state(directory: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors and check them against its ``config.json``.

    Raises:
        ValueError: its weights are damaged or do not fit its config; the message names the file.
        OSError: a file cannot be read.

    """
    spec = read_spec(directory)
    file = WeightFile(Path(directory) / WEIGHTS_FILE)
    state = file.load(file.names())
    try:
        spec.validate(state)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return state
