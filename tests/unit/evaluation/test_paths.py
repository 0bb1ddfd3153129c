# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from vllm_medusa.evaluation.paths import count_paths


def test_a_path_counts_where_every_head_is_right_at_its_rank() -> None:
    ranks = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 2, 0], [1, 0, 0]])  # 2 stands for none.
    counted = count_paths(ranks, num_ranks=2)
    assert counted.accuracies == {
        (0,): 0.75,
        (0, 0): 0.5,
        (0, 0, 1): 0.25,
        (1,): 0.25,
        (1, 0): 0.25,
        (1, 0, 0): 0.25,
    }


def test_no_path_is_more_frequent_than_its_parent() -> None:
    torch.manual_seed(0)
    accuracies = count_paths(torch.randint(4, (500, 4)), num_ranks=3).accuracies
    assert len(accuracies) > 50
    for path, share in accuracies.items():
        assert share <= accuracies.get(path[:-1], 1.0)
