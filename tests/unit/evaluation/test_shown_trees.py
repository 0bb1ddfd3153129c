# SPDX-License-Identifier: Apache-2.0
"""The command shows the trees that an engine would build, and what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.evaluated import write_random_heads
from vllm_medusa.attention.cpu.build import cpu_description
from vllm_medusa.budget.cost import Curve
from vllm_medusa.budget.store import Costs, costs_directory, costs_file
from vllm_medusa.cli import app
from vllm_medusa.evaluation.shown_trees import judge, places

ACCURACIES = [[0.5, 0.2], [0.5, 0.1]]


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    directory = write_random_heads(tmp_path / "heads")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "medusa_accuracies": ACCURACIES}))
    return directory


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tree", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_trees_are_judged_by_the_heads_accuracies(heads: Path) -> None:
    product, sparse = judge(heads, ["[2, 1]", "sparse"], None, 3)
    assert product.probabilities == pytest.approx([0.5, 0.2, 0.5 * 0.5, 0.2 * 0.5])
    assert product.tokens_per_step == pytest.approx(1 + 1.05)
    assert sparse.tree.choices == [[0], [0, 0], [1]]


def test_paths_that_were_counted_whole_come_before_products(heads: Path) -> None:
    config = json.loads((heads / "config.json").read_text())
    shares = {"0": 0.5, "0,0": 0.45, "1": 0.2}
    (heads / "config.json").write_text(json.dumps({**config, "medusa_path_accuracies": shares}))
    assert judge(heads, ["sparse"], None, 3)[0].probabilities == pytest.approx([0.5, 0.45, 0.2])


def test_the_command_shows_compares_and_writes_trees(heads: Path, tmp_path: Path) -> None:
    written, plot = tmp_path / "tree.json", tmp_path / "tree.png"
    trees = ["[[0], [1], [0, 0]]", "chain"]
    shown = run(*trees, "--heads", str(heads), "--output", str(written), "--plot", str(plot))
    assert "0  0.250" in shown
    assert "1.95" in shown
    assert json.loads(written.read_text()) == {"medusa_tree": [[0], [1], [0, 0]]}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "1.95" in run(str(written), "--heads", str(heads))


def test_costs_that_an_engine_has_measured_on_this_machine_say_what_a_tree_gains(
    heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    asked = ("[2, 1]", "--heads", str(heads))
    assert "No costs: no engine with these heads" in run(*asked)
    engine = {"heads": str(heads.resolve()), "cpu": cpu_description(), "target": "t", "dtype": "d", "threads": "2"}
    for number, seconds in enumerate((9.0, 0.016)):
        costs = Costs(
            verification=Curve(sizes=(1, 5, 10), seconds=(0.01, seconds, 2 * seconds)),
            proposal=Curve(sizes=(1, 2), seconds=(0.001, 0.004)),
            engine={**engine, "tree": "chain of 2"} if number else {**engine, "cpu": "another"},
        )
        path = costs_file(costs_directory(str(tmp_path)), costs.engine)
        path.parent.mkdir(parents=True, exist_ok=True)
        costs.write(path)
    alone, two = run(*asked), run(*asked, "--requests", "2")
    assert "17.0" in alone
    assert f"{2.05 * 10 / 17:.2f}x" in alone
    assert "Steps of 1 request, by the costs of t (d, 2 threads), measured for a chain of 2" in alone
    assert "36.0" in two
    assert "Steps of 2 requests" in two


@pytest.mark.parametrize(
    ("wanted", "words"), [("dynamic", "no shape to show"), ("[2, ", "no list"), ("wide", "none of"), ("[[1, 1]]", "")]
)
def test_other_words_are_refused_in_one_line(heads: Path, wanted: str, words: str) -> None:
    result = CliRunner().invoke(app, ["tree", wanted, "--heads", str(heads)])
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert words in line


def test_a_node_stands_over_the_middle_of_its_children() -> None:
    assert places([-1, 0, 0, 1, 1]) == [1.25, 0.5, 2.0, 0.0, 1.0]
