# SPDX-License-Identifier: Apache-2.0
"""The heads' probabilities come to what is accepted, depth by depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_medusa.budget.correction import HORIZON, Correction


def test_before_anything_is_verified_heads_are_taken_at_their_word() -> None:
    said = torch.tensor([[0.9, 0.5, 0.1]])
    assert torch.equal(Correction(2).apply(said, torch.tensor([[1, 1, 2]])), said)


def test_the_ratio_of_each_depth_is_learned_online() -> None:
    correction, random = Correction(3), torch.Generator().manual_seed(0)
    true_ratios = torch.tensor([1.0, 1.2, 0.5, 1.0])
    for _ in range(4 * HORIZON):
        depths = torch.randint(1, 3, (24,), generator=random)
        said = torch.rand(24, generator=random) * 0.8
        accepted = torch.rand(24, generator=random) < said * true_ratios[depths]
        correction.observe(depths.numpy(), said.numpy(), accepted.numpy())
    assert correction.ratios.tolist() == pytest.approx(true_ratios.tolist(), rel=0.06)


def test_corrected_probabilities_fall_along_a_draft_and_are_probabilities() -> None:
    correction = Correction(2)
    for _ in range(500):
        correction.observe(np.array([1, 2]), np.array([0.4, 0.2]), np.array([False, True]))
    found = correction.apply(torch.tensor([[0.9, 0.8, 0.5]]), torch.tensor([[1, 2, 1]]))
    assert bool((found.diff() <= 0).all())
    assert bool(((found >= 0) & (found <= 1)).all())


def test_a_depth_that_is_not_verified_any_more_returns_to_the_heads_own_judgement() -> None:
    correction = Correction(2)
    for _ in range(2000):
        correction.observe(np.array([1, 2]), np.array([0.5, 0.5]), np.array([True, False]))
    assert float(correction.ratios[2]) < 0.1
    for _ in range(8 * HORIZON):
        correction.observe(np.array([1]), np.array([0.5]), np.array([True]))
    assert float(correction.ratios[2]) == pytest.approx(1.0, abs=0.05)
