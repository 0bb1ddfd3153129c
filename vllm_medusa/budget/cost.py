# SPDX-License-Identifier: Apache-2.0
"""What work of a size takes: measured at some sizes, corrected by what is observed while serving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SPEED_HORIZON = 20
"""Observations after which an earlier one counts a third in how fast the machine is just now."""

SHAPE_HORIZON = 256
"""The same in what a size takes beside other sizes."""

MEASURED = 8.0
"""The weight of the measured curve, where an observation at its own size has 1. The curve leaves out attention and the
host's work."""

MOST_SURPRISE = math.log(1.5)
"""The most by which an observation differs from what was expected, as it counts; other processes disturb a step now and
then."""


class Curve(BaseModel):
    """Seconds at some sizes.

    Attributes:
        sizes: ascending, from 1 on.
        seconds: as many.

    """

    model_config = ConfigDict(frozen=True)

    sizes: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
    seconds: tuple[Seconds, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.sizes) != len(self.seconds) or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes must ascend and have a time each, got {self.sizes} and {self.seconds}")
        return self

    @classmethod
    def of_rounds(
        cls,
        sizes: Sequence[int],
        times: np.ndarray,  # [rounds, sizes], float64
    ) -> Self:
        """Reduce rounds, in each of which every size was timed once, to what a size takes beside others.

        A machine's speed may change by a tenth from second to second, so sizes are compared within each round. On a
        machine like that, of ten rounds, the least times were off by 4 per cent beside each other and these by 2.
        """
        logs = np.log(times)
        speed = logs.mean(axis=1, keepdims=True)
        typical = np.exp(np.median(speed) + np.median(logs - speed, axis=0))
        # No size takes longer than a larger one; where it did, something else ran.
        ascending = np.minimum.accumulate(typical[::-1])[::-1]
        return cls(sizes=tuple(sizes), seconds=tuple(ascending.tolist()))


class CostTable:
    """A curve that follows observations.

    What was observed, as a multiple of the measured curve, is taken apart: the machine's speed just now, which is the
    same at every size and changes within seconds, and a factor at each of four sizes an octave, the average of what was
    observed near it. So a size that was last visited while the machine was slow does not look dear beside others, and
    sizes that are not visited follow those that are. Between sizes it is linear, beyond the last measured one too, and
    it never falls.

    Args:
        curve: what was measured.
        most: the largest size that is asked for.

    """

    def __init__(self, curve: Curve, most: int) -> None:
        sizes, seconds = np.array([0, *curve.sizes]), np.maximum.accumulate([0, *curve.seconds])
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        self._sizes = np.unique(np.round(2 ** np.arange(0, np.log2(most) + 0.25, 0.25)))
        beyond = (self._sizes - sizes[-1]).clip(min=0)
        self._measured = np.interp(self._sizes, sizes, seconds) + slope * beyond
        self._observed = 0
        self._log_speed = 0.0
        self._log_factors = np.zeros(len(self._sizes))
        self._weights = np.full(len(self._sizes), MEASURED)
        self._seconds = self._measured

    def observe(self, size: int, seconds: float) -> None:
        """Note what work of a size took."""
        measured = float(np.interp(size, self._sizes, self._measured))
        expected = self._log_speed + float(np.interp(size, self._sizes, self._log_factors))
        surprise = math.log(seconds / measured) - expected
        surprise = min(max(surprise, -MOST_SURPRISE), MOST_SURPRISE)
        self._observed += 1
        of_speed = surprise / min(self._observed, SPEED_HORIZON)
        self._log_speed += of_speed
        octaves = np.log2(self._sizes / size)
        nearness = np.exp(-32 * octaves * octaves)
        self._weights = self._weights * (1 - 1 / SHAPE_HORIZON) + nearness
        self._log_factors = self._log_factors + nearness / self._weights * (surprise - of_speed)
        self._seconds = np.maximum.accumulate(self._measured * np.exp(self._log_speed + self._log_factors))

    def between(self, first: int, last: int) -> np.ndarray:
        """Return the seconds of all sizes from ``first`` to ``last``, both included, float64."""
        return np.interp(np.arange(first, last + 1), self._sizes, self._seconds)

    def at(self, size: int) -> float:
        """Return the seconds of a size."""
        return float(np.interp(size, self._sizes, self._seconds))
