# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.checkpoint.entries import MOST_MATCHED
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.drafts import NO_TOKEN
from vllm_medusa.tree.levels import Asked, PlainHeads
from vllm_medusa.tree.lookup import LONGEST_MATCH, LookupHeads, last_tokens, mixed, weights_tensor
from vllm_medusa.tree.static import chain

VOCAB = 3
UNKNOWN = 99
"""What the heads say first: a token that no text has, as are the ones after it."""

SAID = [0.3, 0.25, 0.2, 0.15, 0.1]


def unsure_heads(num_reqs: int, num_heads: int) -> PlainHeads:
    shape = num_reqs, num_heads, len(SAID)
    return PlainHeads(torch.tensor(SAID).log().expand(shape), (UNKNOWN + torch.arange(len(SAID))).expand(shape))


def longest_match(text: list[int], path: list[int]) -> tuple[int, int]:
    """Return the longest match's length and the token that followed the last one as long; 0 where there is none.

    Args:
        text: what is known, up to and with the root.
        path: the drafted tokens after the root.

    """
    whole, best = text + path, (0, 0)
    for end in range(len(text) - 1):
        length = 0
        while length <= min(end, LONGEST_MATCH - 1) and text[end - length] == whole[-1 - length]:
            length += 1
        if length and length >= best[0]:
            best = length, text[end + 1]
    return best


texts = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=24)


@deterministic
@given(both=st.lists(texts, min_size=1, max_size=3), path=st.lists(st.integers(0, VOCAB - 1), max_size=3))
def test_the_last_of_the_longest_matches_of_a_path_is_found(both: list[list[int]], path: list[int]) -> None:
    length = max(map(len, both))
    text = torch.tensor([[NO_TOKEN] * (length - len(each)) + each for each in both], dtype=torch.int32)
    # A weight that tells the length, so that the answer shows it.
    weights = weights_tensor([[(matched + 1) / 10 for matched in range(1, LONGEST_MATCH + 1)]] * (len(path) + 1))
    heads = LookupHeads(unsure_heads(len(both), len(path) + 1), text, weights, VOCAB)
    first = torch.zeros(len(both), 1, dtype=torch.int64)

    found = heads.top_predictions(Asked(text[:, -1:].long()), 5)
    for token in path:
        found = heads.top_predictions(Asked(torch.full_like(first, token), first), 5)

    for log_probs, tokens, each in zip(*found, both, strict=True):
        matched, followed = longest_match(each, path)
        if not matched:
            assert log_probs[0].exp().tolist() == pytest.approx(SAID)
            continue
        at = int((tokens[0] == followed).nonzero()[0, 0])
        assert log_probs[0, at].exp().item() == pytest.approx((matched + 1) / 10)


def test_what_followed_is_drafted_with_what_heads_say() -> None:
    text = torch.tensor([[5, 6, 7, 8, 5, 6], [NO_TOKEN, 1, 2, 3, 4, 5]], dtype=torch.int32)
    weights = weights_tensor([[0.1, 0.6], [0.1, 0.6]])

    drafts = BeamTree(2, 4, 4, 2, 0.0).draft(LookupHeads(unsure_heads(2, 2), text, weights, 9), text[:, -1].long())

    assert drafts.tokens[0, :2].tolist() == [7, 8]
    assert drafts.parents[0, :2].tolist() == [0, 1]
    assert drafts.log_probs is not None
    assert drafts.log_probs[0, :2].exp().tolist() == pytest.approx([0.6, 0.36])
    assert (drafts.tokens[1] >= UNKNOWN).all()


def test_a_chain_follows_a_match_that_is_more_probable_than_the_heads_first_token() -> None:
    text = torch.tensor([[5, 6, 7, 8, 5, 6]], dtype=torch.int32)
    for weight, expected in ((0.3, [7, 8]), (0.1, [UNKNOWN, UNKNOWN])):
        heads = LookupHeads(unsure_heads(1, 2), text, weights_tensor([[weight]] * 2), 9)
        assert chain(2).draft_by_level(heads, torch.tensor([6])).tokens.tolist() == [expected]


def test_what_the_target_cannot_read_is_not_drafted() -> None:
    text = torch.tensor([[5, 6, 7, 8, 5, 6]], dtype=torch.int32)
    for vocab_size, expected in ((8, 7), (7, UNKNOWN)):
        heads = LookupHeads(unsure_heads(1, 1), text, weights_tensor([[0.9]]), vocab_size)
        assert heads.top_tokens(Asked(text[:, -1:].long()), 1).item() == expected


def test_the_weights_of_a_token_that_both_name_add_up() -> None:
    log_probs, tokens = torch.tensor([[0.5, 0.3, 0.1]]).log(), torch.tensor([[4, 5, 6]])
    best, of_best = mixed(log_probs, tokens, torch.tensor([5]), torch.tensor([0.4]), 3)
    assert of_best.tolist() == [[5, 4, 6]]
    assert best.exp()[0].tolist() == pytest.approx([0.6 * 0.3 + 0.4, 0.6 * 0.5, 0.6 * 0.1])
    best, of_best = mixed(log_probs, tokens, torch.tensor([9]), torch.tensor([0.0]), 3)
    assert of_best.tolist() == [[4, 5, 6]]
    torch.testing.assert_close(best, log_probs)


def test_texts_end_at_their_roots() -> None:
    stored = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 0, 0, 0], [7, 8, 9, 0, 0]], dtype=torch.int32)
    found = last_tokens(stored, torch.tensor([2, 0]), torch.tensor([2, 4]), 3)
    assert found.tolist() == [[NO_TOKEN, 7, 8], [2, 3, 4]]


def test_a_checkpoint_has_no_more_weights_than_are_read() -> None:
    assert MOST_MATCHED == LONGEST_MATCH


def test_the_last_weight_is_of_all_longer_matches() -> None:
    found = weights_tensor([[0.25, 0.5]])
    assert found.tolist() == [[0.0, 0.25] + [0.5] * (LONGEST_MATCH - 1)]
