# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from vllm_medusa.evaluation.temperatures import GRID, best_temperature, losses_by_temperature

POSITIONS = 20_000


def drawn(temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels that are drawn from them at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(POSITIONS, 40, generator=generator)
    labels = (logits / temperature).softmax(dim=-1).multinomial(1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 0.8, 1.0, 1.25, 2.0, 3.1])
def test_the_temperature_at_which_labels_were_drawn_is_found(temperature: float) -> None:
    assert best_temperature(losses_by_temperature(*drawn(temperature))) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_is_more_likely() -> None:
    logits, labels = drawn(1.4)
    found = best_temperature(losses_by_temperature(logits, labels))

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    assert loss(found) <= min(loss(found * 1.03), loss(found / 1.03))


@pytest.mark.parametrize(("temperature", "end"), [(0.05, 0), (30.0, -1)])
def test_a_temperature_beyond_the_grid_gives_its_end(temperature: float, end: int) -> None:
    assert best_temperature(losses_by_temperature(*drawn(temperature))) == GRID[end]


def test_losses_are_the_cross_entropies_at_each_temperature() -> None:
    logits, labels = drawn(1.0)
    found = losses_by_temperature(logits, labels)
    assert found.shape == (POSITIONS, len(GRID))
    for column, temperature in enumerate(GRID):
        expected = torch.nn.functional.cross_entropy(logits / temperature, labels, reduction="none")
        torch.testing.assert_close(found[:, column], expected, rtol=1e-4, atol=1e-4)
    assert losses_by_temperature(logits[:0], labels[:0]).shape == (0, len(GRID))
