# SPDX-License-Identifier: Apache-2.0
"""How fast a device could be: the time that bytes and operations take at the rates measured on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Bound(StrEnum):
    """What a floor is made of."""

    BYTES = "bytes"
    OPERATIONS = "operations"


@dataclass(frozen=True)
class Work:
    """What a stage cannot do without.

    Attributes:
        bytes: read from the device's memory or written to it, each once.
        operations: multiplications and additions of its products.
        dtype: of the products' operands, by torch's name.

    """

    bytes: float
    operations: float = 0.0
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Floor:
    """The least time for some work.

    Attributes:
        seconds: the time.
        bound: what takes most of it.

    """

    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do in a second.

    Attributes:
        copied_bytes: bytes that a large copy within its memory reads and writes.
        operations: by dtype, those of a large product of matrices.

    """

    copied_bytes: float
    operations: Mapping[str, float]

    def floor(self, stages: Iterable[Work]) -> Floor:
        """Return the least time for stages that follow one another; within a stage bytes and operations overlap.

        Raises:
            ValueError: no rate of products was measured for a stage's dtype.

        """
        by_bound = dict.fromkeys(Bound, 0.0)
        for stage in stages:
            reading, computing = stage.bytes / self.copied_bytes, 0.0
            if stage.operations:
                if stage.dtype not in self.operations:
                    raise ValueError(f"no rate of products was measured for {stage.dtype}, only {[*self.operations]}")
                computing = stage.operations / self.operations[stage.dtype]
            bound = Bound.BYTES if reading >= computing else Bound.OPERATIONS
            by_bound[bound] += max(reading, computing)
        return Floor(sum(by_bound.values()), max(by_bound, key=lambda bound: by_bound[bound]))
