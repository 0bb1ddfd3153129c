# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.losses import (
    LabelCounts,
    count_labels,
    distillation_loss,
    head_pairs,
    lm_loss,
    medusa_loss,
)

SPEC = HeadsSpec(hidden_size=8, vocab_size=16, num_heads=3)


@pytest.fixture
def heads() -> TrainableHeads:
    torch.manual_seed(0)
    heads = TrainableHeads(SPEC, torch.randn(16, 8))
    for parameter in heads.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return heads


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(16, (2, 11), generator=torch.Generator().manual_seed(2))


def by_hand(heads: TrainableHeads, hidden: torch.Tensor, labels: torch.Tensor, decay: float) -> torch.Tensor:
    """Equation 1 position by position: head k (from 1) at t against the label at t + 1 + k."""
    total = torch.zeros(())
    for k in range(1, SPEC.num_heads + 1):
        terms = [
            functional.cross_entropy(heads.logits(k - 1, hidden[row, t]), labels[row, t + 1 + k])
            for row in range(hidden.shape[0])
            for t in range(hidden.shape[1] - 1 - k)
            if labels[row, t + 1 + k] != IGNORED
        ]
        total = total + decay**k * torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 4096])
@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_loss_and_gradients_are_those_of_the_equation_whatever_the_chunks(heads, hidden, tokens, chunk_size, decay):
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    expected = by_hand(heads, hidden, labels, decay)
    expected_gradients = torch.autograd.grad(expected, list(heads.parameters()))
    loss = medusa_loss(heads, hidden, labels, decay, chunk_size)
    gradients = torch.autograd.grad(loss, list(heads.parameters()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_chunks_hold_one_chunks_logits_at_a_time(heads, hidden, tokens):
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        medusa_loss(heads, hidden, tokens, chunk_size=4)
    assert saved
    assert all(shape[-1] != SPEC.vocab_size for shape in saved if len(shape) == 2)


def test_gradients_reach_hidden_states_that_want_them(heads, hidden, tokens):
    hidden.requires_grad_()
    medusa_loss(heads, hidden, tokens, chunk_size=4).backward()
    assert hidden.grad is not None
    assert hidden.grad[:, :-2].abs().sum(-1).min() > 0
    assert hidden.grad[:, -2:].abs().max() == 0


def test_a_head_is_paired_with_the_token_at_its_depth():
    positions = torch.arange(10)[None]
    for head in range(3):
        states, targets = head_pairs(head, positions[..., None].float(), positions)
        assert torch.equal(targets, states[:, 0].long() + head + 2)
        assert len(targets) == 10 - 2 - head


def test_no_labels_give_no_loss(heads, hidden):
    assert medusa_loss(heads, hidden, torch.full((2, 11), IGNORED)) == 0


def lm_head(hidden: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    return hidden @ weight.T


@pytest.mark.parametrize("chunk_size", [1, 3, 4096])
def test_the_targets_loss_is_its_cross_entropy_whatever_the_chunks(hidden, tokens, chunk_size):
    hidden.requires_grad_()
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    expected = functional.cross_entropy(lm_head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = lm_loss(lm_head, hidden, labels, chunk_size)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize("chunk_size", [1, 3, 4096])
def test_the_divergence_is_that_from_the_original_to_the_trained_target(hidden, tokens, chunk_size):
    hidden.requires_grad_()
    original = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(4))
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    teacher, trained = lm_head(original).softmax(-1), lm_head(hidden).softmax(-1)
    each = (teacher * (teacher.log() - trained.log())).sum(-1)[:, :-1]
    expected = each[labels[:, 1:] != IGNORED].mean()
    loss = distillation_loss(lm_head, hidden, original, labels, chunk_size)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_a_target_that_has_not_changed_does_not_diverge(hidden, tokens):
    hidden.requires_grad_()
    loss = distillation_loss(lm_head, hidden, hidden.detach(), tokens)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6


def test_the_targets_logits_of_one_chunk_exist_at_a_time(hidden, tokens):
    seen = []

    def watched(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return lm_head(states)

    hidden.requires_grad_()
    (lm_loss(watched, hidden, tokens, 4) + distillation_loss(watched, hidden, hidden.detach(), tokens, 4)).backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * (20 + 2 * 20)


def test_the_shares_of_unequal_batches_add_up_to_the_loss_of_all(heads, hidden, tokens):
    labels = tokens.clone()
    labels[0, :8] = IGNORED
    counts = LabelCounts.of(count_labels(labels, heads))
    assert counts == LabelCounts(target=13, heads=(12, 11, 10))
    losses = (
        lambda rows, **given: medusa_loss(heads, hidden[rows], labels[rows], **given),
        lambda rows, **given: lm_loss(lm_head, hidden[rows], labels[rows], **given),
        lambda rows, **given: distillation_loss(lm_head, hidden[rows], 2 * hidden[rows], labels[rows], **given),
    )
    for loss in losses:
        shares = loss(slice(0, 1), counts=counts) + loss(slice(1, 2), counts=counts)
        torch.testing.assert_close(shares, loss(slice(0, 2)))
