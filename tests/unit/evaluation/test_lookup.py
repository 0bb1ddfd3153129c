# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from tests.unit.tree.test_lookup import longest_match, texts
from vllm_medusa.evaluation import lookup
from vllm_medusa.evaluation.lookup import Matches, best_weights
from vllm_medusa.tree.lookup import LONGEST_MATCH

HEADS = 3


@deterministic
@given(text=texts, window=st.sampled_from([9, 64]))
def test_matches_along_a_text_are_those_that_serving_finds(text: list[int], window: int) -> None:
    with patch.object(lookup, "LOOKBACK", window):
        found = Matches.of(torch.tensor(text), HEADS)
    for head in range(HEADS):
        for position in range(len(text) - 1 - head):
            root = position + 1
            read = text[max(0, root + 1 - window) : root + 1]
            length, followed = longest_match(read, text[root + 1 : root + 1 + head])
            assert found.lengths[position, head] == length
            if length:
                assert found.tokens[position, head] == followed


def test_the_weight_of_a_length_is_how_often_its_matches_are_right_where_heads_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    followed = torch.rand(4000, generator=generator) < 0.7
    lengths = torch.full((4000,), 2)
    weights = best_weights(torch.zeros(4000), followed, lengths)
    assert weights[0] == 0.0
    assert weights[1] == pytest.approx(0.7, abs=0.02)
    assert weights[1:] == [weights[1]] * (LONGEST_MATCH - 1)


def test_matches_that_heads_know_better_are_trusted_less() -> None:
    generator = torch.Generator().manual_seed(0)
    followed, lengths = torch.rand(4000, generator=generator) < 0.5, torch.ones(4000, dtype=torch.int64)
    known, guessed = torch.full((4000,), 0.9), torch.full((4000,), 0.1)
    assert best_weights(known, followed, lengths)[0] < 0.1
    assert best_weights(guessed, followed, lengths)[0] == pytest.approx((0.5 - 0.1) / (1 - 0.1), abs=0.03)
