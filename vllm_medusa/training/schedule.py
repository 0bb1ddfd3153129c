# SPDX-License-Identifier: Apache-2.0
"""Schedules of the learning rates and of the weight of the heads' loss."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """Return the factor on the learning rate: a linear rise over ``warmup`` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def second_stage(step: int, first_stage: int, warmup: int, total: int) -> float:
    """Return the factor on the target's learning rate: 0 in the first stage, then ``cosine_with_warmup``."""
    return 0.0 if step < first_stage else cosine_with_warmup(step - first_stage, warmup, total - first_stage)


def sine_rise(step: int, total: int) -> float:
    """Return the factor on lambda_0: ``sin(pi / 2 * step / total)``, from 0 to 1, as in the paper's reference code."""
    return math.sin(math.pi / 2 * min(1.0, step / max(1, total)))
