# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import AdamW

from tests.unit.strategies import deterministic
from vllm_medusa.training.muon import Muon, orthogonal


@deterministic
@given(
    count=st.integers(1, 3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    scale=st.sampled_from([1e-5, 1.0, 1e3]),
)
def test_singular_values_become_about_one_and_singular_vectors_stay(count, rows, columns, scale):
    matrices = scale * torch.randn(count, rows, columns, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonal(matrices) @ right.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(diagonal), atol=1e-6, rtol=0)
    firm = values > 0.02 * values.norm(dim=1, keepdim=True)  # Smaller ones need more than five iterations.
    assert ((diagonal > 0.6) & (diagonal < 1.3))[firm].all()


def test_a_gradient_of_zeros_changes_nothing():
    assert not orthogonal(torch.zeros(1, 3, 5)).any()


def test_a_step_moves_a_matrix_as_far_as_adamw_would_whatever_its_gradients_size():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 24))
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.5, weight_decay=0.0)
    weight.grad = 1e-6 * torch.randn(48, 24)
    optimizer.step()
    moved = weight.detach() - before
    assert moved.square().mean().sqrt() == pytest.approx(0.5 * 0.2, rel=0.3)  # Singular values are 0.7 to 1.2.


def test_weight_decay_shrinks_matrices():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.5, weight_decay=0.1)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))


def test_momentum_turns_a_gradient_that_changes_its_sign():
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=1.0, weight_decay=0.0)
    steps = []
    for gradient in [1.0] * 10 + [-0.1]:
        before = weight.item()
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        steps.append(weight.item() - before)
    assert all(step < 0 for step in steps)  # The last gradient is smaller than what its forerunners left.


def test_other_groups_are_adamws():
    torch.manual_seed(0)
    start, gradients = torch.randn(7), torch.randn(3, 7)
    found = []
    for kind in (Muon, AdamW):
        bias = torch.nn.Parameter(start.clone())
        groups = [{"params": [bias]}]
        if kind is Muon:
            groups.append({"params": [torch.nn.Parameter(torch.zeros(2, 2))], "orthogonal": True})
        optimizer = kind(groups, lr=0.1)
        for gradient in gradients:
            bias.grad = gradient.clone()
            optimizer.step()
        found.append(bias.detach())
    assert torch.equal(*found)
