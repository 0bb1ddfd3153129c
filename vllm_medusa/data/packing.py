# SPDX-License-Identifier: Apache-2.0
"""Pack samples, the tokens of records with their labels, into blocks of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

IGNORED = -100
"""The label of a token on which no loss is taken, as in ``torch`` and ``transformers``."""

OPEN_BLOCKS = 64
"""How many unfinished blocks are kept open for further samples."""


@dataclass(frozen=True)
class Sample:
    """Tokens and their labels.

    Attributes:
        input_ids: token ids.
        labels: one per token: its id, or ``IGNORED``.

    """

    input_ids: Sequence[int]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def pack_samples(samples: Iterable[Sample], length: int, padding_id: int) -> Iterator[Sample]:
    """Pack each sample whole into the fullest open block that has room for it.

    A sample longer than a block is cut into pieces; pieces without labels are dropped. Blocks end with padding, which
    has no labels and which no earlier token attends to. There is no attention mask between the samples of a block:
    later samples attend to earlier ones, and heads at the end of one sample predict the beginning of the next, unless
    it begins with an unlabelled prompt.

    Args:
        samples: in any order; they are read once.
        length: tokens per block.
        padding_id: the token id that fills a block.

    Yields:
        Blocks of ``length`` tokens with at least one label each. The order depends only on the samples.

    """
    blocks: list[_Block] = []
    for piece in (piece for sample in samples for piece in _pieces(sample, length)):
        roomy = [block for block in blocks if block.room >= len(piece)]
        if roomy:
            block = min(roomy, key=lambda block: block.room)
        else:
            if len(blocks) == OPEN_BLOCKS:
                fullest = min(blocks, key=lambda block: block.room)
                blocks.remove(fullest)
                yield fullest.closed(padding_id)
            block = _Block(length)
            blocks.append(block)
        block.add(piece)
    for block in blocks:
        yield block.closed(padding_id)


@dataclass(eq=False)
class _Block:
    length: int
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.length - len(self.input_ids)

    def add(self, piece: Sample) -> None:
        self.input_ids.extend(piece.input_ids)
        self.labels.extend(piece.labels)

    def closed(self, padding_id: int) -> Sample:
        return Sample(self.input_ids + [padding_id] * self.room, self.labels + [IGNORED] * self.room)


def _pieces(sample: Sample, length: int) -> Iterator[Sample]:
    for start in range(0, len(sample), length):
        piece = Sample(sample.input_ids[start : start + length], sample.labels[start : start + length])
        if any(label != IGNORED for label in piece.labels):
            yield piece
