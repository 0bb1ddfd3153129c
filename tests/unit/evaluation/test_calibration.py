# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.evaluated import write_random_heads
from tests.unit.full_disk import largest_file
from tests.unit.strategies import deterministic
from vllm_medusa.checkpoint.entries import check_entries, paths_of
from vllm_medusa.evaluation.calibration import MOST_PATHS, Calibration, write_calibration
from vllm_medusa.evaluation.paths import count_paths
from vllm_medusa.tree.best_first import (
    IndependentHeads,
    JointPaths,
    available_nodes,
    best_first,
    expected_acceptance_length,
)
from vllm_medusa.tree.options import TreeOptions
from vllm_medusa.tree.static import chain

ACCURACIES = [[0.5, 0.2, 0.1], [0.4, 0.1, 0.05]]
AVAILABLE = 3 + 9
TEMPERATURES = [1.5, 0.75]
LOOKUP_WEIGHTS = [[0.1, 0.4], [0.2, 0.5]]
FEW = JointPaths({(0,): 0.5})
"""Too few paths to grow trees from."""


def calibration_of(nodes: int) -> Calibration:
    return Calibration.of(ACCURACIES, FEW, TEMPERATURES, LOOKUP_WEIGHTS, nodes)


@pytest.fixture(scope="module")
def counted() -> JointPaths:
    """Paths of heads whose ranks go together."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(4000, 1, generator=generator)
    return count_paths((10 * (first + 0.3 * torch.rand(4000, 3, generator=generator)) ** 3).long(), 10)


@deterministic
@given(heads=st.integers(1, 3), ranks=st.integers(1, 4), data=st.data())
def test_each_size_is_the_best_tree_of_that_size_with_its_expected_length(
    heads: int, ranks: int, data: st.DataObject
) -> None:
    share = st.floats(0, 1 / ranks)
    rows = data.draw(st.lists(st.lists(share, min_size=ranks, max_size=ranks), min_size=heads, max_size=heads))
    calibration = Calibration.of(rows, JointPaths({}), [1.0] * heads, [[0.5]] * heads, nodes=9)
    assert len(calibration.expected_lengths) == min(9, available_nodes(heads, ranks))
    table = IndependentHeads(torch.tensor(rows))
    for nodes, length in enumerate(calibration.expected_lengths, start=1):
        tree = best_first(table, nodes)
        assert calibration.tree(nodes).choices == tree.choices
        assert length == pytest.approx(expected_acceptance_length(tree, table))
    expected = expected_acceptance_length(chain(heads), table)
    assert calibration.expected_length_of_chain == pytest.approx(expected)


@pytest.mark.parametrize("nodes", [0, AVAILABLE + 1])
def test_a_size_that_the_accuracies_do_not_give_is_refused(nodes: int) -> None:
    with pytest.raises(ValueError, match=rf"nodes must be within 1..{AVAILABLE} for 2 heads of 3 .* got {nodes}"):
        calibration_of(nodes=64).tree(nodes)


@pytest.mark.parametrize("nodes", [None, 5])
def test_writing_changes_the_tree_and_what_was_measured_and_nothing_else(tmp_path: Path, nodes: int | None) -> None:
    heads = write_random_heads(tmp_path / "heads")
    before = json.loads((heads / "config.json").read_text())
    weights = (heads / "model.safetensors").read_bytes()
    mode = (heads / "config.json").stat().st_mode
    calibration = calibration_of(nodes=64)
    write_calibration(heads, calibration, nodes)
    after = json.loads((heads / "config.json").read_text())
    table = torch.tensor(ACCURACIES)
    tree = "sparse" if nodes is None else best_first(IndependentHeads(table), nodes).choices
    written = {"medusa_tree": tree, "medusa_accuracies": table.tolist(), "medusa_temperatures": TEMPERATURES}
    written["medusa_lookup_weights"] = LOOKUP_WEIGHTS
    assert after == before | written
    assert (heads / "model.safetensors").read_bytes() == weights
    assert (heads / "config.json").stat().st_mode == mode
    assert sorted(path.name for path in heads.iterdir()) == ["config.json", "model.safetensors"]


def test_what_is_read_back_grows_the_written_tree(tmp_path: Path) -> None:
    heads = write_random_heads(tmp_path / "heads")
    accuracies = torch.rand(3, 10, dtype=torch.float64) / 10
    write_calibration(heads, Calibration.of(accuracies.tolist(), JointPaths({}), [1.0] * 3, [[0.5]] * 3, nodes=64), 40)
    config = json.loads((heads / "config.json").read_text())
    table = IndependentHeads(torch.tensor(config["medusa_accuracies"]))
    assert best_first(table, 40).choices == config["medusa_tree"]


def test_trees_grow_from_whole_paths_where_the_text_shows_enough_of_them(counted: JointPaths) -> None:
    flat = [[0.1] * 10] * 3
    calibration = Calibration.of(flat, counted, [1.0] * 3, [[0.5]] * 3, nodes=64)
    assert calibration.source is counted
    assert calibration.largest.choices == best_first(counted, 64).choices
    assert calibration.expected_lengths[63] == pytest.approx(expected_acceptance_length(calibration.largest, counted))
    few = Calibration.of(
        flat, JointPaths(dict.fromkeys(list(counted.accuracies)[:9], 0.5)), [1.0] * 3, [[0.5]] * 3, nodes=64
    )
    assert few.paths is None
    assert few.largest.choices == best_first(IndependentHeads(torch.tensor(flat)), 64).choices


def test_the_engine_grows_from_the_written_paths_the_trees_that_were_judged(
    tmp_path: Path, counted: JointPaths
) -> None:
    heads = write_random_heads(tmp_path / "heads")
    calibration = Calibration.of([[0.1] * 10] * 3, counted, [1.0] * 3, [[0.5]] * 3, nodes=64)
    write_calibration(heads, calibration, None)
    config = check_entries(json.loads((heads / "config.json").read_text()), "config.json")
    paths = paths_of(config["medusa_path_accuracies"])
    assert len(paths) == MOST_PATHS < counted.available
    options = TreeOptions(3, 300, config["medusa_accuracies"], 64, 7, None, None, path_accuracies=paths)
    assert options.build("sparse").choices == calibration.largest.choices  # type: ignore[union-attr]
    larger = replace(options, num_nodes=MOST_PATHS + 1).build("sparse")
    table = IndependentHeads(torch.tensor(config["medusa_accuracies"]))
    assert larger.choices == best_first(table, MOST_PATHS + 1).choices  # type: ignore[union-attr]
    narrow = replace(options, num_nodes=3, top_k=2).build("sparse")
    assert narrow.choices == best_first(counted.within(3, 2), 3).choices  # type: ignore[union-attr]


def test_another_measurement_leaves_no_paths_of_the_last_one(tmp_path: Path, counted: JointPaths) -> None:
    heads = write_random_heads(tmp_path / "heads")
    write_calibration(heads, Calibration.of([[0.1] * 10] * 3, counted, [1.0] * 3, [[0.5]] * 3, nodes=64), None)
    write_calibration(heads, calibration_of(nodes=64), None)
    assert "medusa_path_accuracies" not in json.loads((heads / "config.json").read_text())


def test_a_full_disk_leaves_the_old_config(tmp_path: Path) -> None:
    heads = write_random_heads(tmp_path / "heads")
    before = (heads / "config.json").read_bytes()
    with largest_file(64), pytest.raises(OSError, match="too large"):
        write_calibration(heads, calibration_of(nodes=8), 8)
    assert (heads / "config.json").read_bytes() == before
    assert sorted(path.name for path in heads.iterdir()) == ["config.json", "model.safetensors"]
