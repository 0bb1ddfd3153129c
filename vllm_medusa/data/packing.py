"""Records' tokens, packed into blocks of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

IGNORED = -100
"""The label of a token that is not learnt; ``torch`` and ``transformers`` use the same."""

OPEN_BLOCKS = 64
"""Blocks that wait for a sample that fits what room they have."""


@dataclass(frozen=True)
class Sample:
    """Tokens, and what is learnt of them.

    Attributes:
        input_ids: token ids.
        labels: for each, itself, or ``IGNORED`` where it is not learnt.

    """

    input_ids: Sequence[int]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def pack_samples(samples: Iterable[Sample], length: int, padding_id: int) -> Iterator[Sample]:
    """Put samples one after another into blocks, each sample whole and into the fullest block where it fits.

    A sample longer than a block is cut; pieces without a label are left out. What room a block has at its end is filled
    with padding, without labels, which no token before it can attend to. Samples in a block are not fenced off: a later
    one may attend to an earlier one, and the deeper heads at the end of one are asked for the labels at the beginning
    of the next, of which there are none where that begins with a prompt.

    Args:
        samples: in any order; they are read once.
        length: tokens per block.
        padding_id: the token id that fills a block.

    Yields:
        Blocks of exactly ``length`` tokens, each with at least one label, in an order that follows from the samples.

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
