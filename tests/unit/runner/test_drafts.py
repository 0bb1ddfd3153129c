# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import torch

from vllm_medusa.runner.v1.drafts import WaitingDrafts as WaitingById
from vllm_medusa.runner.v2.drafts import WaitingDrafts as WaitingByState
from vllm_medusa.structured_output.tokens import TreeTokens
from vllm_medusa.tree.drafts import Drafts

ANY = [0, 1, 2]


def drafts(*parents: list[int]) -> Drafts:
    rows = torch.tensor(parents)
    return Drafts(torch.zeros_like(rows), rows, torch.full((len(parents),), rows.shape[1]))


def test_v1_keeps_each_requests_last_tree_until_it_ends() -> None:
    waiting = WaitingById(num_nodes=3)
    waiting.keep(["a", "b"], drafts([0, 0, 0], [0, 0, 1]))
    waiting.keep(["b"], drafts([0, 1, 1]))
    assert waiting.parents(["b", "unknown", "a"]).tolist() == [[0, 1, 1], ANY, [0, 0, 0]]
    waiting.forget(["a", "never seen"])
    assert waiting.parents(["a", "b"]).tolist() == [ANY, [0, 1, 1]]
    assert len(waiting) == 1


def test_v1_verifies_what_a_grammar_has_left_of_a_draft_and_knows_which_nodes_those_are() -> None:
    waiting = WaitingById(num_nodes=3)
    waiting.keep(["a", "b"], drafts([0, 0, 1], [0, 0, 0]))
    request, node = np.array([0, 0, 1, 1, 1]), np.array([-1, 0, -1, 0, 1])
    assert waiting.drafted_nodes(["b", "a"], request, node).tolist() == node.tolist()
    waiting.leave_out({"a": TreeTokens([7, 8, 9], [0, 0, 1]).of_rows([2]), "b": [5, 6, 7]})
    assert waiting.parents(["a", "b"]).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert waiting.drafted_nodes(["a", "b"], request, node).tolist() == [-1, 1, -1, 0, 1]
    waiting.keep(["a"], drafts([0, 0, 0]))
    assert waiting.drafted_nodes(["a", "b"], request, node).tolist() == node.tolist()


def test_v2_keeps_the_last_tree_of_each_state() -> None:
    waiting = WaitingByState(num_nodes=3, max_num_reqs=4, device=torch.device("cpu"))
    waiting.keep(torch.tensor([3, 1]), drafts([0, 0, 0], [0, 0, 1]))
    waiting.keep(torch.tensor([1]), drafts([0, 1, 1]))
    assert waiting.by_state.tolist() == [ANY, [0, 1, 1], ANY, [0, 0, 0]]
