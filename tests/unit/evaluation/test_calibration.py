# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.evaluated import write_random_heads
from tests.unit.full_disk import largest_file
from tests.unit.strategies import deterministic
from vllm_medusa.evaluation.calibration import Calibration, write_calibration
from vllm_medusa.tree.static import available_nodes, best_first, chain, expected_acceptance_length

ACCURACIES = [[0.5, 0.2, 0.1], [0.4, 0.1, 0.05]]
AVAILABLE = 3 + 9


@deterministic
@given(heads=st.integers(1, 3), ranks=st.integers(1, 4), data=st.data())
def test_each_size_is_the_best_tree_of_that_size_with_its_expected_length(
    heads: int, ranks: int, data: st.DataObject
) -> None:
    share = st.floats(0, 1 / ranks)
    rows = data.draw(st.lists(st.lists(share, min_size=ranks, max_size=ranks), min_size=heads, max_size=heads))
    calibration = Calibration.of(rows, nodes=9)
    assert len(calibration.expected_lengths) == min(9, available_nodes(heads, ranks))
    table = torch.tensor(rows)
    for nodes, length in enumerate(calibration.expected_lengths, start=1):
        tree = best_first(table, nodes)
        assert calibration.tree(nodes).choices == tree.choices
        assert length == pytest.approx(expected_acceptance_length(tree, table))
    expected = expected_acceptance_length(chain(heads), table)
    assert calibration.expected_length_of_chain == pytest.approx(expected)


@pytest.mark.parametrize("nodes", [0, AVAILABLE + 1])
def test_a_size_that_the_accuracies_do_not_give_is_refused(nodes: int) -> None:
    with pytest.raises(ValueError, match=rf"nodes must be within 1..{AVAILABLE} for 2 heads of 3 .* got {nodes}"):
        Calibration.of(ACCURACIES, nodes=64).tree(nodes)


@pytest.mark.parametrize("nodes", [None, 5])
def test_writing_changes_the_tree_and_the_accuracies_and_nothing_else(tmp_path: Path, nodes: int | None) -> None:
    heads = write_random_heads(tmp_path / "heads")
    before = json.loads((heads / "config.json").read_text())
    weights = (heads / "model.safetensors").read_bytes()
    mode = (heads / "config.json").stat().st_mode
    calibration = Calibration.of(ACCURACIES, nodes=64)
    write_calibration(heads, calibration, nodes)
    after = json.loads((heads / "config.json").read_text())
    tree = "sparse" if nodes is None else best_first(torch.tensor(ACCURACIES), nodes).choices
    assert after == before | {"medusa_tree": tree, "medusa_accuracies": torch.tensor(ACCURACIES).tolist()}
    assert (heads / "model.safetensors").read_bytes() == weights
    assert (heads / "config.json").stat().st_mode == mode
    assert sorted(path.name for path in heads.iterdir()) == ["config.json", "model.safetensors"]


def test_what_is_read_back_grows_the_written_tree(tmp_path: Path) -> None:
    heads = write_random_heads(tmp_path / "heads")
    accuracies = torch.rand(3, 10, dtype=torch.float64) / 10
    write_calibration(heads, Calibration.of(accuracies.tolist(), nodes=64), 40)
    config = json.loads((heads / "config.json").read_text())
    assert best_first(torch.tensor(config["medusa_accuracies"]), 40).choices == config["medusa_tree"]


def test_a_full_disk_leaves_the_old_config(tmp_path: Path) -> None:
    heads = write_random_heads(tmp_path / "heads")
    before = (heads / "config.json").read_bytes()
    with largest_file(64), pytest.raises(OSError, match="too large"):
        write_calibration(heads, Calibration.of(ACCURACIES, nodes=8), 8)
    assert (heads / "config.json").read_bytes() == before
    assert sorted(path.name for path in heads.iterdir()) == ["config.json", "model.safetensors"]
