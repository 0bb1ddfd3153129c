# SPDX-License-Identifier: Apache-2.0
"""A frozen target's outputs for all blocks, on disk: they are the same at every pass over the data."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vllm_medusa.files import WriteError, read_json, write_json
from vllm_medusa.training.teacher import LOG_PROBS_DTYPE

INDEX_FILE = "cache.json"
LOCK_FILE = ".lock"
HIDDEN_DTYPE = torch.bfloat16
GIB = 1 << 30

REMEDY = "give another cache_directory, or delete this one"

DIFFERENCES = {
    "target": "another target, or of the same in another dtype or precision",
    "length": "blocks of another length (block_length)",
    "data": "other data, or of the same packed or split in another way",
    "blocks": "other data",
    "hidden_size": "another target",
}
"""Of what a cache is whose key differs in an entry; the first that differs is named."""


@dataclass(frozen=True)
class CacheKey:
    """What a cache's content depends on.

    Attributes:
        target: a hash of the target's weights and of how it computes.
        data: a hash of all blocks' token ids, in their order.
        blocks: number of blocks.
        length: tokens per block.
        hidden_size: width of a hidden state.
        top_tokens: the target's most probable tokens that are kept of each position; 0 for none.

    """

    target: str
    data: str
    blocks: int
    length: int
    hidden_size: int
    top_tokens: int


@dataclass(frozen=True)
class Column:
    """One kind of output; its file holds ``[blocks, length, width]`` without a header.

    Attributes:
        name: its name.
        dtype: its dtype.
        width: numbers per token.

    """

    name: str
    dtype: torch.dtype
    width: int

    def file(self, directory: Path) -> Path:
        return directory / f"{self.name}.bin"

    def block_bytes(self, length: int) -> int:
        return length * self.width * self.dtype.itemsize


class HiddenCache:
    """Hidden states in bf16 and, if the key says so, the target's most probable tokens, memory-mapped.

    Whatever length its files have says how far a killed writer came; the next one goes on from there.

    Args:
        directory: where the files are or will be.
        wanted: what the cache must hold.

    Raises:
        ValueError: the directory holds a cache of something else.

    """

    def __init__(self, directory: Path, wanted: CacheKey) -> None:
        self.directory = directory
        self.key = wanted
        if (directory / INDEX_FILE).exists():
            self.key = self._checked(wanted)
        self.columns = [Column("hidden", HIDDEN_DTYPE, self.key.hidden_size)]
        if self.key.top_tokens:
            self.columns.append(Column("top_tokens", torch.int32, self.key.top_tokens))
            self.columns.append(Column("top_log_probs", LOG_PROBS_DTYPE, self.key.top_tokens))

    @classmethod
    @contextmanager
    def locked(cls, directory: Path, wanted: CacheKey) -> Iterator[HiddenCache]:
        """Open a cache once no other process writes it, and keep others from it."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / LOCK_FILE).open("w")
        except OSError as error:
            raise WriteError(directory, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield cls(directory, wanted)

    @property
    def done(self) -> int:
        """Blocks that are complete."""
        return min(self._size(column) // column.block_bytes(self.key.length) for column in self.columns)

    @property
    def complete(self) -> bool:
        return self.done == self.key.blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of the complete cache."""
        return self.key.blocks * sum(column.block_bytes(self.key.length) for column in self.columns)

    def check_room(self) -> None:
        """Raise ``ValueError`` if the disk has no room for what is missing."""
        missing = self.num_bytes - sum(map(self._size, self.columns))
        free = shutil.disk_usage(self.directory).free
        if missing > free:
            raise ValueError(
                f"cache_hidden needs {missing / GIB:.2f} GiB more in {self.directory}, where {free / GIB:.2f} GiB are "
                "free; make room, or give another cache_directory"
            )

    def begin(self) -> None:
        """Prepare to append after the last complete block; raises ``WriteError`` if that fails."""
        done = self.done
        try:
            write_json(self.directory / INDEX_FILE, asdict(self.key))
            for column in self.columns:
                with column.file(self.directory).open("ab") as stream:
                    stream.truncate(done * column.block_bytes(self.key.length))
        except OSError as error:
            raise WriteError(self.directory, error) from error

    def append(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Append blocks, ``[blocks, length, width]`` for each column; raises ``WriteError`` if that fails."""
        for column in self.columns:
            values = outputs[column.name].to("cpu", column.dtype).contiguous()
            try:
                with column.file(self.directory).open("ab") as stream:
                    stream.write(values.view(torch.uint8).numpy().data)
            except OSError as error:
                raise WriteError(self.directory, error) from error

    def block(self, row: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return a block's outputs by their names, ``[length, width]`` each; the cache must be complete."""
        return {name: torch.from_numpy(self._maps[name][row].copy()).view(self._dtypes[name]) for name in names}

    @cached_property
    def _maps(self) -> dict[str, np.ndarray]:
        """Each column's file as ``[blocks, length, width in bytes]``, since numpy knows no bf16."""
        return {
            column.name: np.memmap(
                column.file(self.directory),
                np.uint8,
                "r",
                shape=(self.key.blocks, self.key.length, column.width * column.dtype.itemsize),
            )
            for column in self.columns
        }

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {column.name: column.dtype for column in self.columns}

    def _size(self, column: Column) -> int:
        file = column.file(self.directory)
        return file.stat().st_size if file.exists() else 0

    def _checked(self, wanted: CacheKey) -> CacheKey:
        """Return the key of what the directory holds, which may have more than is wanted."""
        try:
            found = CacheKey(**read_json(self.directory / INDEX_FILE))
        except TypeError:
            raise ValueError(f"{self.directory / INDEX_FILE} is not of a cache of hidden states; {REMEDY}") from None
        for name, what in DIFFERENCES.items():
            if getattr(found, name) != getattr(wanted, name):
                raise ValueError(f"{self.directory} holds hidden states of {what}; {REMEDY}")
        if found.top_tokens < wanted.top_tokens:
            raise ValueError(
                f"{self.directory} holds no log-probabilities, from which heads_loss 'kl' learns; {REMEDY}"
            )
        return found
