# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional

from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.divergence import Expected, linear_divergence

POSITIONS, WIDTH, ROWS, TOKENS = 9, 8, 20, 5
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 4, 9, 100])


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def lm_head() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def top_tokens(left_out: float) -> Expected:
    """Different tokens at each position, which leave a share of their probability to the tail."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.stack([torch.randperm(ROWS, generator=generator)[:TOKENS] for _ in range(POSITIONS)])
    probabilities = torch.randn(POSITIONS, TOKENS, generator=generator).softmax(-1) * (1 - left_out)
    return Expected(rows, probabilities, torch.rand(POSITIONS, generator=generator))


def by_hand(states: torch.Tensor, lm_head: torch.Tensor, expected: Expected) -> torch.Tensor:
    """The definition, position by position: the tail is one outcome, and tokens without a row are left out."""
    total = torch.zeros(())
    for at, weight in enumerate(expected.weights):
        q = (lm_head @ states[at]).softmax(-1)
        rows, probabilities = expected.rows[at], expected.probabilities[at]
        named = q[rows[rows >= 0]]
        p = torch.cat([probabilities[rows >= 0], 1 - probabilities.sum()[None]])
        q = torch.cat([named, 1 - named.sum()[None]])
        kept = p > 1e-6
        mass = p.sum()
        total = total + weight * (p[kept] * (p[kept] / mass / q[kept]).log()).sum()
    return total


@CHUNKS
def test_the_divergence_from_labels_is_the_cross_entropy(states, lm_head, chunk_size):
    labels = torch.arange(POSITIONS)
    expected = functional.cross_entropy(states @ lm_head.T, labels, reduction="sum") * 0.5
    loss = linear_divergence(states, Expected.labels(labels, 0.5), lm_head, chunk_size)
    torch.testing.assert_close(loss, expected)
    gradients, expected_gradients = (torch.autograd.grad(each, [states, lm_head]) for each in (loss, expected))
    torch.testing.assert_close(gradients, expected_gradients)


@CHUNKS
@pytest.mark.parametrize("left_out", [0.0, 0.3])
def test_tokens_that_are_not_named_are_one_outcome(states, lm_head, chunk_size, left_out):
    wanted = top_tokens(left_out)
    wanted.rows[::2, 1] = IGNORED
    wanted.rows[3] = IGNORED
    expected, loss = by_hand(states, lm_head, wanted), linear_divergence(states, wanted, lm_head, chunk_size)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradients, expected_gradients = (torch.autograd.grad(each, [states, lm_head]) for each in (loss, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)


def test_nothing_that_can_be_drafted_is_nothing_to_learn(states, lm_head):
    wanted = top_tokens(0.1)
    wanted.rows[:] = IGNORED
    loss = linear_divergence(states, wanted, lm_head, 4)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, states)[0].abs().max() < 1e-6


def test_what_is_predicted_already_does_not_diverge(states, lm_head):
    best = (states @ lm_head.T).softmax(-1).detach().topk(TOKENS)
    loss = linear_divergence(states, Expected(best.indices, best.values, torch.ones(POSITIONS)), lm_head, 4)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(loss, states)[0].abs().max() < 1e-6


def test_an_lm_head_that_is_not_trained_gets_no_gradient(states, lm_head):
    frozen = lm_head.detach()
    linear_divergence(states, Expected.labels(torch.arange(POSITIONS), 1.0), frozen, 4).backward()
    assert frozen.grad is None
    assert states.grad is not None
    assert states.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_in_the_dtype_of_autocast_and_gradients_in_full(states, lm_head, dtype):
    wanted = Expected.labels(torch.arange(POSITIONS), 1e-7)  # As small as a step of a million labels makes it.
    expected = torch.autograd.grad(linear_divergence(states, wanted, lm_head, 4), [states, lm_head])
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_divergence(states, wanted, lm_head, 4)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, [states, lm_head])
    for gradient, exact in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, exact)
        assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_no_positions_give_no_loss(states, lm_head):
    loss = linear_divergence(states[:0], Expected.labels(torch.arange(0), 1.0), lm_head, 4)
    loss.backward()
    assert loss == 0
    assert lm_head.grad is not None
    assert not lm_head.grad.any()
