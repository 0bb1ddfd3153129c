# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle

import pytest
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_medusa.structured_output.tokens import TreeTokens

DRAFT = TreeTokens([7, 8, 9, 5], [0, 0, 1, 3])


def test_tokens_know_their_tree_in_another_process() -> None:
    there = pickle.loads(pickle.dumps(DRAFT))
    assert (type(there), there, there.parents, there.nodes) == (TreeTokens, [7, 8, 9, 5], [0, 0, 1, 3], None)


def test_what_vllm_cuts_off_leaves_a_tree() -> None:
    for cut in (DRAFT[:2], strip_speculative_padding(TreeTokens([7, 8, -1, -1], DRAFT.parents))):
        assert isinstance(cut, TreeTokens)
        assert (cut, cut.parents) == ([7, 8], DRAFT.parents)
    assert DRAFT[1] == 8
    with pytest.raises(ValueError, match="no prefix of a draft"):
        DRAFT[1:]


def test_rows_that_are_left_keep_their_parents() -> None:
    left = DRAFT.of_rows([1, 3, 4])
    assert (left, left.parents, left.nodes) == ([7, 9, 5], [0, 1, 2], [0, 2, 3])
    assert DRAFT.of_rows([1, 2, 3, 4]) is DRAFT
    assert DRAFT.of_rows([]) == []
