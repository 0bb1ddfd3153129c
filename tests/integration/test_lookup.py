# SPDX-License-Identifier: Apache-2.0
"""What followed a path earlier in a request's text is drafted beside what heads say; texts stay those of stock vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.integration.engines import engine, generate, generate_staggered, greedy, model_runner, spec_counters, texts
from tests.integration.test_dynamic_trees import MOST, NODES, OPTIONS, TOKENS, Plain
from tests.under_test import UNDER_TEST, on
from vllm_medusa.tree.drafts import NO_TOKEN, Drafts

TREES: list[Any] = on(
    v1=[
        ("chain", "tiny_sequential_heads"),
        ("dynamic", "tiny_sequential_heads"),
        ("sparse", "tiny_heads"),
        ("dynamic", "tiny_heads"),
    ],
    v2=[("dynamic", "tiny_sequential_heads"), ("sparse", "tiny_heads")],
)


@pytest.mark.both_runners
@pytest.mark.parametrize(("tree", "kind"), TREES)
def test_texts_equal_those_without_speculation(
    tree: Any,
    kind: str,
    plain: Plain,
    tiny_target: Path,
    with_lookup: Callable[[Path], Path],
    request: pytest.FixtureRequest,
) -> None:
    nodes, trained = 4 if tree == "chain" else NODES, with_lookup(request.getfixturevalue(kind))
    options: dict[str, Any] = {"max_num_batched_tokens": MOST * (nodes + 1) - nodes // 2, **OPTIONS}
    speculative: dict[str, Any] = {"num_speculative_tokens": nodes}
    with engine(tiny_target, heads=trained, tree=tree, speculative_config=speculative, **options) as llm:
        found = plain.is_said_by(llm)
    if UNDER_TEST.is_v2:
        return  # Which tokens are drafted does not depend on the runner.
    speculative["medusa_lookup"] = False
    with engine(tiny_target, heads=trained, tree=tree, speculative_config=speculative, **options) as llm:
        assert texts(generate_staggered(llm, plain.prompts, greedy(TOKENS), most=MOST)) == plain.greedy
        alone = spec_counters(llm)
    print("\nacceptance length:", tree, kind, found.acceptance_length, alone.acceptance_length)
    assert found.acceptance_length > alone.acceptance_length


@pytest.mark.both_runners
def test_paths_are_looked_up_in_what_each_request_has_read_and_said(
    tiny_target: Path,
    tiny_sequential_heads_with_lookup: Path,
    held_out_prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [prompt[:length] for prompt, length in zip(held_out_prompts, (5, 12, 9), strict=False)]
    seen: list[tuple[int, list[int]]] = []
    options = {"heads": tiny_sequential_heads_with_lookup, "tree": "dynamic", "max_num_batched_tokens": 128}
    with engine(tiny_target, **options) as llm:
        proposer = proposer_of(llm)
        propose = proposer.propose

        def watched(hidden: torch.Tensor, roots: torch.Tensor, text: torch.Tensor, *others: Any) -> Drafts:
            seen.extend(zip(roots.tolist(), text.tolist(), strict=True))
            return propose(hidden, roots, text, *others)

        monkeypatch.setattr(proposer, "propose", watched)
        outputs = generate(llm, prompts, greedy(9))
    whole = [prompt + said for prompt, said in zip(prompts, texts(outputs), strict=True)]
    lengths = set()
    for root, text in seen:
        known = [token for token in text if token != NO_TOKEN]
        assert text == [NO_TOKEN] * (len(text) - len(known)) + known
        assert known[-1] == root
        # The last step may draft from more than a request is allowed to say.
        of = [index for index, each in enumerate(whole) if known[: len(each)] == each[: len(known)]]
        assert of
        lengths |= {(of[0], len(known))}
    assert {index for index, _ in lengths} == set(range(len(prompts)))
    assert len(lengths) > 2 * len(prompts)


def proposer_of(llm: LLM) -> Any:
    runner = model_runner(llm)
    return runner.speculator.proposer if UNDER_TEST.is_v2 else runner.drafter
