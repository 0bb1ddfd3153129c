# SPDX-License-Identifier: Apache-2.0
"""Kinds of heads are compared tree by tree, with the first kind as the measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from compare_heads import Entry, Found, as_json, entries, share_of_same, trees
from dialogues import Answers
from vllm_medusa.demo.contenders import NATIVE_CHAIN

KINDS = {"plain": Path("plain"), "sequential": Path("sequential")}
NATIVE = {"method": "medusa", "model": "native"}


def test_each_kind_meets_each_tree_and_vllm_s_chain_runs_once() -> None:
    found = entries(KINDS, NATIVE)
    assert found[Entry(NATIVE_CHAIN, "chain")] == NATIVE
    assert len(found) == 1 + 2 * len(KINDS) * len(trees())
    for name, looks_up in (("sequential", False), ("sequential, lookup", True)):
        grown = found[Entry(name, "tree_7")]
        assert grown is not None
        assert (grown["model"], grown["num_speculative_tokens"], grown["medusa_budget"]) == ("sequential", 7, "off")
        assert grown["medusa_lookup"] is looks_up


def test_figures_are_relative_to_the_first_kind() -> None:
    found = {entry: Found(2.0 if entry.kind == "sequential" else 1.6, 1.0) for entry in entries(KINDS, NATIVE)}
    results = as_json(found)
    assert results["heads"]["plain"]["chain"]["against_first"] == 1
    assert results["heads"]["sequential"]["tree_31"]["against_first"] == pytest.approx(1.25)
    assert results[NATIVE_CHAIN]["tokens_per_step"] == 1.6


def test_a_question_is_the_same_if_all_of_its_answers_are() -> None:
    reference = [Answers([[[1], [2]], [[3]]], 1.0, 0, 0)]
    assert share_of_same([Answers([[[1], [9]], [[3]]], 1.0, 0, 0)], reference) == 0.5
