# SPDX-License-Identifier: Apache-2.0
"""Read a checkpoint's weights file by file, so that a model larger than memory can be split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from vllm_medusa.checkpoint.confined import indexed_files
from vllm_medusa.checkpoint.pickles import is_plain, unpickle
from vllm_medusa.messages import shortened

ORIGINAL_FILE = "medusa_lm_head.pt"
"""The original repository's file of heads."""

HEADS_FILES = ("medusa_lm_head.safetensors", ORIGINAL_FILE)
"""Files that hold only heads; text-generation-inference and LoRAX read the first."""

INDEXED = {SAFE_WEIGHTS_NAME: SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME: WEIGHTS_INDEX_NAME}
"""A model's weight file, and the index that it has instead if the weights are sharded."""


@dataclass(frozen=True)
class WeightFile:
    """One file of tensors: safetensors, or a pickle, of which no code is run.

    Raises:
        ValueError: the file is damaged, or holds something other than named tensors.
        OSError: the file cannot be read.

    """

    path: Path

    def names(self) -> list[str]:
        if not self._is_safetensors:
            return list(self._unpickled())
        with self._opened() as stored:
            return list(stored.keys())

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU; no two share memory."""
        if self._is_safetensors:
            with self._opened() as stored:
                return {name: stored.get_tensor(name) for name in names}
        unpickled = self._unpickled()
        # The original code has one module for all layers of a head, so its files hold one tensor under several names.
        return {name: unpickled[name].clone() for name in names}

    @property
    def _is_safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as stored:
                yield stored
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is not a readable safetensors file, it is incomplete or damaged ({error}); "
                "download it again"
            ) from None

    def _unpickled(self) -> dict[str, torch.Tensor]:
        content = unpickle(self.path)
        if not isinstance(content, dict):
            raise ValueError(
                f"{self.path} holds a {type(content).__name__}, not a state_dict; save the state_dict alone"
            )
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"{self.path} holds a {type(value).__name__} under {shortened(name)}, not a tensor under a name; "
                    "save the state_dict alone"
                )
            if not is_plain(value):
                raise ValueError(
                    f"{self.path} holds {shortened(name)} as a tensor of {tuple(value.shape)} that does not store its "
                    "elements one by one; save the state_dict of dense tensors"
                )
        return content


@dataclass(frozen=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        names: the names of the tensors in each file.

    """

    names: dict[WeightFile, list[str]]

    @classmethod
    def find(cls, directory: Path) -> Weights:
        """Find a directory's weights. A file of heads comes before a model's, and safetensors before pickles.

        Raises:
            ValueError: there are none, or a file is damaged.
            OSError: a file cannot be read.

        """
        return cls({file: file.names() for file in map(WeightFile, _paths(directory))})

    def __iter__(self) -> Iterator[str]:
        for names in self.names.values():
            yield from names

    def load(self, wanted: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the wanted tensors from all files."""
        chosen = set(wanted)
        loaded: dict[str, torch.Tensor] = {}
        for file, names in self.names.items():
            loaded |= file.load(name for name in names if name in chosen)
        return loaded


def _paths(directory: Path) -> list[Path]:
    for name in HEADS_FILES:
        if (directory / name).exists():
            return [directory / name]
    for name, index in INDEXED.items():
        if (directory / index).exists():
            return indexed_files(directory / index)
        if (directory / name).exists():
            return [directory / name]
    found = sorted(path.name for path in directory.iterdir())
    raise ValueError(
        f"{directory} holds no known weight file; it needs one of {', '.join((*HEADS_FILES, *INDEXED))} "
        f"(or an index of the last two), but it has {', '.join(found[:5]) or 'nothing'}"
    )
