# SPDX-License-Identifier: Apache-2.0
"""Pack token ids into blocks of one length, and batch the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch


def pack_blocks(documents: Iterable[Sequence[int]], length: int) -> torch.Tensor:
    """Concatenate documents and cut the result into blocks; the rest is dropped.

    Args:
        documents: each document's token ids, including special tokens.
        length: tokens per block.

    Returns:
        ``[blocks, length]``, int64.

    Raises:
        ValueError: the documents do not fill one block.

    """
    ids = torch.tensor(list(chain.from_iterable(documents)), dtype=torch.int64)
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"{len(ids)} tokens do not fill one block of {length}")
    return ids[: count * length].view(count, length)


def shuffled_batches(blocks: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches ``[batch, length]`` of ``[blocks, length]`` for ever, each epoch in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(blocks), generator=generator).split(batch_size):
            yield blocks[rows]
