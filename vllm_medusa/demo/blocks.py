"""Token ids in blocks of one length, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch


def pack_blocks(documents: Iterable[Sequence[int]], length: int) -> torch.Tensor:
    """Put documents one after another and cut the result into blocks.

    Args:
        documents: each document's token ids, its first and last special tokens included.
        length: tokens per block; what is left over at the end is dropped.

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
    """Yield batches for ever, every block once per pass, in a new order each pass.

    Args:
        blocks: ``[blocks, length]``.
        batch_size: blocks per batch; a pass's last batch may be smaller.
        seed: what the order depends on.

    Yields:
        ``[batch, length]``.

    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(blocks), generator=generator).split(batch_size):
            yield blocks[rows]
