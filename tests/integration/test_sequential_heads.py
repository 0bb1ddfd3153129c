# SPDX-License-Identifier: Apache-2.0
"""Heads that read the path to a node give stock vLLM's text, in fewer steps than plain heads from the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import engine, generate_staggered, greedy, spec_counters
from tests.integration.test_dynamic_trees import MOST, NODES, OPTIONS, TOKENS, Plain
from tests.under_test import UNDER_TEST, on

TREES: list[Any] = on(v1=["chain", "sparse", "dynamic"], v2=["dynamic"])


@pytest.mark.both_runners
@pytest.mark.parametrize("tree", TREES)
def test_texts_equal_those_without_speculation(
    tree: Any, plain: Plain, tiny_target: Path, tiny_heads: Path, tiny_sequential_heads: Path
) -> None:
    nodes = 4 if tree == "chain" else NODES
    options: dict[str, Any] = {
        "speculative_config": {"num_speculative_tokens": nodes},
        "max_num_batched_tokens": MOST * (nodes + 1) - nodes // 2,
        **OPTIONS,
    }
    with engine(tiny_target, heads=tiny_sequential_heads, tree=tree, **options) as llm:
        sequential = plain.is_said_by(llm)
    if UNDER_TEST.is_v2:
        return  # Which tokens heads draft does not depend on the runner.
    with engine(tiny_target, heads=tiny_heads, tree=tree, **options) as llm:
        generate_staggered(llm, plain.prompts, greedy(TOKENS), most=MOST)
        independent = spec_counters(llm)
    print("\nacceptance length:", tree, independent.acceptance_length, sequential.acceptance_length)
    assert sequential.acceptance_length > independent.acceptance_length
