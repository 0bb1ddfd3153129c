# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from vllm_medusa.data.packing import IGNORED
from vllm_medusa.evaluation.walk import visited
from vllm_medusa.tree.static import chain, from_choices

NONE = 9
"""A rank that no tree here holds."""


def test_a_step_begins_behind_what_the_last_one_accepted_and_the_token_after() -> None:
    ranks = torch.tensor([[0, 0], [NONE, 0], [0, 0], [0, 1], [NONE, 0], [0, NONE], [0, 0], [0, 0]])
    assert visited(ranks, chain(2)).nonzero()[:, 0].tolist() == [0, 3, 5, 7]
    assert visited(ranks, chain(1)).nonzero()[:, 0].tolist() == [0, 2, 4, 5, 7]
    branching = from_choices([[0], [0, 1]])
    assert visited(ranks, branching).nonzero()[:, 0].tolist() == [0, 2, 4, 5, 7]


def test_every_run_of_labels_is_decoded_from_its_beginning() -> None:
    ranks = torch.tensor([[IGNORED, 0], [0, 0], [0, 0], [0, IGNORED], [IGNORED, IGNORED], [NONE, 0], [0, 0], [0, 0]])
    assert visited(ranks, chain(2)).nonzero()[:, 0].tolist() == [1, 5, 6]


def test_hard_positions_are_seen_more_often_than_the_text_has_them() -> None:
    torch.manual_seed(0)
    easy = torch.rand(400).repeat_interleave(25) < 0.5
    ranks = torch.where(easy[:, None], 0, NONE).expand(-1, 3)
    begins = visited(ranks, chain(3))
    assert easy.float().mean() > 0.4
    assert easy[begins].float().mean() < 0.3
