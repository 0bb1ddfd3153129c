# SPDX-License-Identifier: Apache-2.0
"""Floors are what bytes and operations take at the rates measured, stage after stage."""

from __future__ import annotations

import pytest

from gpu_bench.roofline import Bound, Floor, Rates, Work

RATES = Rates(copied_bytes=1000.0, operations={"bfloat16": 100.0, "float32": 10.0})


def test_within_a_stage_the_slower_of_bytes_and_operations_counts() -> None:
    assert RATES.floor([Work(bytes=500, operations=20)]) == Floor(0.5, Bound.BYTES)
    assert RATES.floor([Work(bytes=500, operations=80)]) == Floor(0.8, Bound.OPERATIONS)


def test_stages_follow_one_another_and_the_bound_is_what_takes_most_of_the_time() -> None:
    reading, computing = Work(bytes=500, operations=20), Work(bytes=100, operations=40)
    assert RATES.floor([reading, computing]) == Floor(pytest.approx(0.9), Bound.BYTES)
    assert RATES.floor([reading, computing, computing]) == Floor(pytest.approx(1.3), Bound.OPERATIONS)


def test_products_are_taken_at_the_rate_of_their_own_dtype() -> None:
    assert RATES.floor([Work(bytes=0, operations=5, dtype="float32")]).seconds == 0.5
    with pytest.raises(ValueError, match=r"no rate of products was measured for float16, only \['bfloat16', 'float32'"):
        RATES.floor([Work(bytes=1, operations=1, dtype="float16")])


def test_a_stage_without_products_needs_no_rate_of_them() -> None:
    assert RATES.floor([Work(bytes=100, dtype="int64")]) == Floor(0.1, Bound.BYTES)
