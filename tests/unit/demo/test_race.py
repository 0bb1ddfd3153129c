# SPDX-License-Identifier: Apache-2.0
"""Contenders take turns on each question until all have answered it, each on the engine that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluated import HEADS, write_random_heads, write_target
from vllm_medusa.demo.contenders import CONTENDERS, NATIVE_CHAIN, PLAIN, TREE, TREE_WIDE, TREES, speculative_configs
from vllm_medusa.demo.engine import Decoded, Order
from vllm_medusa.demo.process import NEXT_TURN, take_turns
from vllm_medusa.demo.race import Race, first_of_each

ORDER = Order([[1, 2]], 8)


@dataclass
class Scripted:
    """A contender that is done after some turns."""

    name: str
    turns: int
    log: list[tuple[str, Any]]
    text: list[int] = field(default_factory=list)

    def ask(self, order: Any) -> Decoded:
        self.log.append((self.name, order))
        self.text.append(len(self.text))
        return Decoded([list(self.text)], 1.0, 0, 0, 0, finished=len(self.text) == self.turns)


def test_contenders_take_turns_until_each_is_done() -> None:
    log: list[tuple[str, Any]] = []
    seen: list[Mapping[str, int]] = []
    contenders: list[Any] = [Scripted("a", 3, log), Scripted("b", 1, log), Scripted("c", 2, log)]
    done = take_turns(contenders, ORDER, lambda states: seen.append({n: len(s.texts[0]) for n, s in states.items()}))
    assert [name for name, _ in log] == ["a", "b", "c", "a", "c", "a"]
    assert [asked for _, asked in log] == [ORDER, ORDER, ORDER, NEXT_TURN, NEXT_TURN, NEXT_TURN]
    assert seen[0] == {"a": 1}
    assert seen[-1] == {"a": 3, "b": 1, "c": 2}
    assert {name: state.texts for name, state in done.items()} == {"a": [[0, 1, 2]], "b": [[0]], "c": [[0, 1]]}


def test_the_first_questions_of_each_kind_are_chosen() -> None:
    assert first_of_each(["a", "b", "a", "b", "b"], 1) == [0, 1]
    assert first_of_each(["a", "b", "a", "b", "b"], 2) == [0, 1, 2, 3]


def test_the_wide_tree_answers_only_its_questions(tmp_path: Path) -> None:
    race = Race(tmp_path, "float32", {}, prompts=[[1], [2], [3]], wide_asked=[1], tokens=8, stop=(0,), threads=1)
    assert race.asked(TREE) == [0, 1, 2]
    assert race.asked(TREE_WIDE) == [1]
    assert race.order(2).prompts == [[3]]


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_texts_are_exact_where_the_race_is_in_fp32(tmp_path: Path, dtype: str, exact: bool) -> None:
    assert Race(tmp_path, dtype, {}, [[1]], [], 8, ()).is_exact is exact


def test_each_contender_gets_the_engine_it_stands_for(tmp_path: Path) -> None:
    target, heads = write_target(tmp_path / "target"), write_random_heads(tmp_path / "heads")
    medusa = {"method": "medusa", "model": str(heads)}
    assert speculative_configs(CONTENDERS, target, heads, heads, tmp_path) == {
        PLAIN: None,
        NATIVE_CHAIN: {**medusa, "num_speculative_tokens": HEADS},
        TREE: {**medusa, **TREES[TREE]},
        TREE_WIDE: {**medusa, **TREES[TREE_WIDE]},
    }
    assert list(speculative_configs([PLAIN, TREE], target, heads, heads, tmp_path)) == [PLAIN, TREE]
