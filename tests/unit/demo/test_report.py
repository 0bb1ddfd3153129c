# SPDX-License-Identifier: Apache-2.0
"""Figures are medians over questions, against plain vLLM on the same question, by kind and over all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from vllm_medusa.demo.contenders import PLAIN, TREE, TREE_WIDE
from vllm_medusa.demo.engine import Decoded
from vllm_medusa.demo.race import Run
from vllm_medusa.demo.report import draw, print_table, summarise, summarise_by_kind, write_results

KINDS = ["maths", "code", "maths", "code"]
TEXT, OTHER = [1, 2, 3, 4, 5], [1, 2, 3, 4, 9]


def plain(seconds: float) -> Decoded:
    return Decoded([TEXT], seconds, steps=len(TEXT) - 1, drafted=0, accepted=0)


RUNS = {
    PLAIN: Run(
        {0: plain(4.0), 1: plain(2.0), 2: plain(1.0), 3: plain(2.0)},
        dict.fromkeys(range(4), TEXT),
    ),
    TREE: Run(
        {
            0: Decoded([TEXT], 2.0, steps=2, drafted=9, accepted=2),
            1: Decoded([TEXT], 0.5, steps=2, drafted=6, accepted=4),
            2: Decoded([OTHER], 1.0, steps=4, drafted=10, accepted=0),
            3: Decoded([TEXT], 0.5, steps=2, drafted=5, accepted=2),
        },
        {0: TEXT, 1: TEXT, 2: OTHER, 3: TEXT},
    ),
    TREE_WIDE: Run(
        {0: Decoded([TEXT], 8.0, steps=1, drafted=31, accepted=3), 1: Decoded([TEXT], 2.0, 1, 31, 3)},
        {0: TEXT, 1: TEXT},
    ),
}


def test_figures_over_all_questions() -> None:
    summary = summarise(RUNS)
    assert summary[PLAIN]["tokens_per_second"] == 2.0
    assert summary[PLAIN]["speedup"] == summary[PLAIN]["tokens_per_step"] == 1.0
    assert summary[TREE]["tokens_per_second"] == 6.0
    assert summary[TREE]["speedup"] == 3.0
    assert summary[TREE]["tokens_per_step"] == pytest.approx(1 + 8 / 10)
    assert summary[TREE]["drafted_tokens"] == 3.0
    assert (summary[TREE]["identical_texts"], summary[TREE]["texts"]) == (3, 4)


def test_a_contender_is_compared_on_the_questions_that_it_answers() -> None:
    summary = summarise(RUNS)
    assert (summary[TREE_WIDE]["identical_texts"], summary[TREE_WIDE]["texts"]) == (2, 2)
    assert summary[TREE_WIDE]["speedup"] == pytest.approx((0.5 + 1.0) / 2)
    assert summary[TREE_WIDE]["tokens_per_step"] == 4.0


def test_figures_by_kind() -> None:
    by_kind = summarise_by_kind(RUNS, KINDS)
    assert list(by_kind) == ["maths", "code"]
    assert by_kind["code"][TREE]["speedup"] == 4.0
    assert by_kind["code"][TREE]["tokens_per_step"] == 2.5
    assert by_kind["maths"][TREE]["speedup"] == 1.5
    assert (by_kind["maths"][TREE]["identical_texts"], by_kind["maths"][TREE]["texts"]) == (1, 2)
    assert by_kind["maths"][TREE_WIDE]["texts"] == 1


def test_answers_of_one_token_are_compared_and_not_timed() -> None:
    short = Decoded([[2]], 0.0, 0, 0, 0)
    runs = {
        name: Run(run.answers | {4: short}, run.exact | {4: [2]}) for name, run in RUNS.items() if name != TREE_WIDE
    }
    assert summarise(runs)[TREE]["speedup"] == 3.0
    assert (summarise(runs)[TREE]["identical_texts"], summarise(runs)[TREE]["texts"]) == (4, 5)
    with pytest.raises(ValueError, match="no answer has more than one token"):
        summarise({PLAIN: Run({0: short}, {0: [2]})})


def test_the_table_has_a_row_for_each_kind_and_one_for_all() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        print_table(summarise(RUNS), summarise_by_kind(RUNS, KINDS), console)
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in captured.get().splitlines() if "│" in row]
    assert [row[0] for row in rows] == ["maths", "code", "all", "tokens/s", "drafted per step", "same text, fp32"]
    assert rows[1][1:] == ["1.00, 1.00x", "2.50, 4.00x", "4.00, 1.00x"]
    assert rows[5][1:] == ["4 of 4", "3 of 4", "2 of 2"]


def test_results_say_what_they_were_measured_with(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", {"runs": summarise(RUNS), "by_kind": summarise_by_kind(RUNS, KINDS)})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == summarise(RUNS)
    assert results["by_kind"] == summarise_by_kind(RUNS, KINDS)
    assert results["machine"]["cores"] >= 1
    assert results["versions"].keys() >= {"python", "torch", "transformers", "vllm", "vllm_medusa"}


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    draw(tmp_path / "results.png", summarise(RUNS), summarise_by_kind(RUNS, KINDS), "two kinds")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
