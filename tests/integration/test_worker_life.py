# SPDX-License-Identifier: Apache-2.0
"""What the worker finds of Medusa between steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.integration.engines import engine, generate, greedy, model_runner, spec_counters
from tests.under_test import UNDER_TEST
from vllm_medusa.attention.metadata import TreeMetadataBuilder
from vllm_medusa.model.heads import MedusaHeads

pytestmark = pytest.mark.both_runners


@pytest.fixture(scope="module")
def used(tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]]) -> Iterator[LLM]:
    """An engine whose last step has verified drafts."""
    with engine(tiny_target, heads=tiny_heads, tree=[3, 2, 1]) as llm:
        generate(llm, held_out_prompts[:2], greedy(8))
        assert spec_counters(llm).accepted > 0
        yield llm


@pytest.mark.skipif(not UNDER_TEST.is_v2, reason="V1 has no CUDA graphs here, and announces before each build")
def test_what_is_built_after_a_step_has_no_trees(used: LLM) -> None:
    """Capture builds metadata without asking the model runner; it must not find the trees of the warm-up's steps."""
    groups = [group for groups in model_runner(used).attn_groups for group in groups]
    builders = [builder for group in groups for builder in group.metadata_builders]
    assert builders
    for builder in builders:
        assert isinstance(builder, TreeMetadataBuilder)
        assert builder.trees is None or builder.trees.num_drafting_reqs == 0


def test_the_heads_are_the_draft_model(used: LLM) -> None:
    """The worker saves its weights from level-2 sleep and updates them."""
    assert isinstance(model_runner(used).get_draft_model(), MedusaHeads)
