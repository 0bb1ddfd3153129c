# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.losses import head_pairs, medusa_loss
from vllm_medusa.training.paths import path_tokens

PLAIN, SEQUENTIAL = HeadsSpec(8, 16, 3), HeadsSpec(8, 16, 3, path_rank=4)


@pytest.fixture
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, ``[2, 9, 8]``, and tokens, ``[2, 9]``."""
    torch.manual_seed(0)
    return torch.randn(2, 9, 8), torch.randint(16, (2, 9))


def sequential() -> TrainableHeads:
    torch.manual_seed(1)
    heads = TrainableHeads(SEQUENTIAL, torch.randn(16, 8), embedding=torch.randn(16, 8))
    for head in heads.paths:
        torch.nn.init.normal_(head.up.weight)
    return heads


@pytest.mark.parametrize("head", [0, 1, 2])
def test_a_head_reads_the_tokens_between_its_hidden_state_and_its_label(head: int) -> None:
    places = torch.arange(18).view(2, 9)
    at, label = head_pairs(head, places[..., None], places)
    expected = [list(range(start + 1, end)) for start, end in zip(at.flatten().tolist(), label.tolist(), strict=True)]
    assert path_tokens(head, places).tolist() == expected


def test_untrained_sequential_heads_say_what_plain_ones_say(text: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, tokens = text
    lm_head = torch.randn(16, 8)
    plain = TrainableHeads(PLAIN, lm_head)
    untrained = TrainableHeads(SEQUENTIAL, lm_head, embedding=torch.randn(16, 8))
    expected = medusa_loss(plain, hidden, tokens)
    torch.testing.assert_close(medusa_loss(untrained, hidden, tokens, input_ids=tokens), expected)


def test_the_scale_of_the_embedding_changes_nothing() -> None:
    heads, hidden, path = sequential(), torch.randn(5, 8), torch.randint(16, (5, 2))
    before = heads.states(1, hidden, path)
    heads.embedding = 45 * heads.embedding
    torch.testing.assert_close(heads.states(1, hidden, path), before)


def test_all_that_a_head_reads_its_path_with_is_trained(text: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, tokens = text
    heads = sequential()
    medusa_loss(heads, hidden, tokens, input_ids=tokens).backward()
    named = [(name, parameter.grad) for name, parameter in heads.named_parameters() if name.startswith("paths.")]
    assert len(named) == 3 * 3 + 1 + 2 + 3
    assert all(gradient is not None and bool(gradient.any()) for _, gradient in named)


def test_the_embedding_is_no_part_of_the_checkpoint() -> None:
    assert sequential().state_dict().keys() == SEQUENTIAL.shapes().keys()
