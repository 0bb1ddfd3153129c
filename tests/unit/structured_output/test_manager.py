# SPDX-License-Identifier: Apache-2.0
"""Masks of trees are those that a grammar gives which reads each path from the start; vLLM's own backends say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
    StructuredOutputOptions,
)
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from tests.toy.tokenizer import train_tokenizer
from tests.unit.strategies import deterministic
from vllm_medusa.structured_output.manager import TreeStructuredOutputManager
from vllm_medusa.structured_output.pace import MASK_SECONDS, Pace
from vllm_medusa.structured_output.tokens import TreeTokens

BACKENDS = [XgrammarBackend, GuidanceBackend, OutlinesBackend]
REGEXES = [r"[a-f]{3,9}-[0-9]{2}", r"([^;]{2};){3}", "(red|green|blue|gre)", "a?b?"]
VOCABULARY = 300
NODES, REQUESTS = 9, 4
NOTHING_FORBIDDEN = -1
few = settings(deterministic, max_examples=30)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["red green blue", "abc-12; fed-34;"] * 4, VOCABULARY)


def config(*, v2: bool = False) -> Any:
    return SimpleNamespace(
        use_v2_model_runner=v2,
        num_speculative_tokens=NODES,
        speculative_config=SimpleNamespace(num_speculative_tokens=NODES),
        parallel_config=SimpleNamespace(distributed_executor_backend="uni"),
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
        model_config=SimpleNamespace(
            skip_tokenizer_init=True, is_diffusion=False, hf_config=SimpleNamespace(model_type="llama")
        ),
        structured_outputs_config=SimpleNamespace(
            enable_in_reasoning=False, disable_any_whitespace=True, disable_additional_properties=False
        ),
    )


@cache
def backend(kind: type[StructuredOutputBackend]) -> StructuredOutputBackend:
    return kind(config(), tokenizer(), len(tokenizer()))


def grammar(kind: type[StructuredOutputBackend], regex: str) -> StructuredOutputGrammar:
    return backend(kind).compile_grammar(StructuredOutputOptions.REGEX, regex)


def manager(kind: type[StructuredOutputBackend], *, v2: bool = False) -> TreeStructuredOutputManager:
    made = TreeStructuredOutputManager(config(v2=v2))
    made.backend = backend(kind)
    return made


class Asking(SimpleNamespace):
    """A request; each is itself, as vLLM's are."""

    __hash__ = object.__hash__


def request(name: str, own: StructuredOutputGrammar) -> Any:
    structured = SimpleNamespace(grammar=own, reasoning_ended=None, reasoner=None, reasoning_parser_kwargs=None)
    return Asking(
        request_id=name,
        structured_output_request=structured,
        use_structured_output=True,
        prompt_token_ids=[],
        all_token_ids=[],
    )


def fill(own: StructuredOutputGrammar, kind: type[StructuredOutputBackend]) -> np.ndarray:
    row = backend(kind).allocate_token_bitmask(1)
    if own.is_terminated():
        row.fill_(NOTHING_FORBIDDEN)
    else:
        own.fill_bitmask(row, 0)
    return row[0].numpy()


def allows(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // 32] >> (token % 32) & 1)


def mask_after(kind: type[StructuredOutputBackend], regex: str, path: Sequence[int]) -> np.ndarray | None:
    """Return the mask that a new grammar gives after these tokens; None where it forbids one of them."""
    fresh = grammar(kind, regex)
    for token in path:
        if not fresh.is_terminated():
            if not allows(fill(fresh, kind), token):
                return None
            assert fresh.accept_tokens("fresh", [token])
    return fill(fresh, kind)


def path_to(draft: TreeTokens, row: int) -> list[int]:
    return [*path_to(draft, draft.parents[row - 1]), draft[row - 1]] if row else []


@st.composite
def drafts(draw: st.DrawFn, kind: type[StructuredOutputBackend], regex: str) -> TreeTokens:
    """Any tree; most of its tokens are allowed, some by chance, and siblings carry different ones."""
    draft = TreeTokens([], parents := [])
    for _ in range(draw(st.integers(0, NODES))):
        parent = draw(st.integers(0, len(draft)))
        mask = mask_after(kind, regex, path_to(draft, parent))
        allowed = [] if mask is None else [token for token in range(len(tokenizer())) if allows(mask, token)]
        token = draw(
            st.sampled_from(allowed) if allowed and draw(st.integers(0, 3)) else st.integers(1, len(tokenizer()) - 1)
        )
        if (parent, token) not in zip(parents, draft, strict=True):
            draft.append(token)
            parents.append(parent)
    return draft


@pytest.mark.parametrize("kind", BACKENDS)
@few
@given(st.data())
def test_each_row_has_the_mask_of_its_path(kind: type[StructuredOutputBackend], data: st.DataObject) -> None:
    regexes = data.draw(st.lists(st.sampled_from(REGEXES), min_size=1, max_size=REQUESTS))
    grammars = [grammar(kind, regex) for regex in regexes]
    requests = {f"request {index}": request(f"request {index}", own) for index, own in enumerate(grammars)}
    scheduled = {name: data.draw(drafts(kind, regex)) for name, regex in zip(requests, regexes, strict=True)}
    before = [fill(own, kind) for own in grammars]

    found = manager(kind).grammar_bitmask(requests, list(requests), {n: each for n, each in scheduled.items() if each})

    assert found is not None
    rows = iter(found)
    for draft, regex in zip(scheduled.values(), regexes, strict=True):
        for row in range(len(draft) + 1):
            expected = mask_after(kind, regex, path_to(draft, row))
            assert (next(rows) == (NOTHING_FORBIDDEN if expected is None else expected)).all()
    assert next(rows, None) is None
    assert all((fill(own, kind) == mask).all() for own, mask in zip(grammars, before, strict=True))


@few
@given(st.data())
def test_v1_verifies_the_branches_that_the_grammar_allows_and_v2_all(data: st.DataObject) -> None:
    regex = data.draw(st.sampled_from(REGEXES))
    draft = data.draw(drafts(XgrammarBackend, regex))
    asking = request("request", grammar(XgrammarBackend, regex))

    left = manager(XgrammarBackend).validate_tokens(asking, draft)

    assert isinstance(left, TreeTokens)
    allowed = [
        row for row in range(1, len(draft) + 1) if mask_after(XgrammarBackend, regex, path_to(draft, row)) is not None
    ]
    assert [path_to(left, row) for row in range(1, len(left) + 1)] == [path_to(draft, row) for row in allowed]
    assert left.nodes == (None if len(allowed) == len(draft) else [row - 1 for row in allowed])
    padded = TreeTokens([*draft, -1, -1], [*draft.parents, 0, 0])
    assert manager(XgrammarBackend, v2=True).validate_tokens(asking, padded) == draft


@pytest.mark.parametrize("v2", [False, True])
def test_where_masks_are_slow_the_first_nodes_are_verified(v2: bool) -> None:
    asking = request("request", grammar(XgrammarBackend, REGEXES[2]))
    r, g, b, z = tokenizer().convert_tokens_to_ids(["r", "g", "b", "z"])
    made = manager(XgrammarBackend, v2=v2)
    made._pace = Pace()
    assert made.validate_tokens(asking, TreeTokens([z, r, g, b], [0, 0, 0, 0])) == ([z, r, g, b] if v2 else [r, g, b])
    made._pace.took(asking, 1, MASK_SECONDS / 2)
    assert made.validate_tokens(asking, TreeTokens([z, r, g, b], [0, 0, 0, 0])) == ([z, r] if v2 else [r, g])


def test_a_request_that_follows_no_grammar_keeps_its_tokens() -> None:
    free = SimpleNamespace(use_structured_output=False)
    left = manager(XgrammarBackend).validate_tokens(free, TreeTokens([5, 6, -1], [0, 0, 0]))  # type: ignore[arg-type]
    assert left == [5, 6, -1]
    assert type(left) is list


def test_a_draft_of_padding_has_the_roots_mask_and_then_none() -> None:
    regex = REGEXES[0]
    requests = {"request": request("request", grammar(XgrammarBackend, regex))}
    found = manager(XgrammarBackend).grammar_bitmask(requests, ["request"], {"request": [-1, -1]})
    assert found is not None
    assert (found[0] == mask_after(XgrammarBackend, regex, [])).all()
    assert (found[1:] == NOTHING_FORBIDDEN).all()
    assert len(found) == 3


class Reasoner:
    """Reasoning ends with a token."""

    def __init__(self, end: int) -> None:
        self.end = end

    def is_reasoning_end(self, token_ids: Sequence[int]) -> bool:
        return self.end in token_ids

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Sequence[int]) -> bool:
        return self.end in delta_ids


def test_a_grammar_begins_on_each_path_where_reasoning_ends_on_it() -> None:
    regex = REGEXES[0]
    end, a, b, z = tokenizer().convert_tokens_to_ids([";", "a", "b", "z"])
    #             row 1  2    3  4  5  6    7
    draft = TreeTokens([z, end, a, z, b, end, a], [0, 1, 2, 2, 3, 0, 1])
    asking = request("request", grammar(XgrammarBackend, regex))
    made = manager(XgrammarBackend)
    made.reasoner_cls = Reasoner  # type: ignore[assignment]
    asking.structured_output_request.reasoner = Reasoner(end)

    found = made.grammar_bitmask({"request": asking}, ["request"], {"request": draft})

    assert found is not None
    for row, path in {2: [], 3: [a], 5: [a, b], 6: []}.items():
        assert (found[row] == mask_after(XgrammarBackend, regex, path)).all()
    for row in (0, 1, 4, 7):  # Before the end, or forbidden behind it.
        assert (found[row] == NOTHING_FORBIDDEN).all()
    left = made.validate_tokens(asking, draft)
    assert isinstance(left, TreeTokens)
    assert left.nodes == [0, 1, 2, 4, 5, 6]


def test_an_engine_without_medusa_has_vllms_own_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_medusa.plugin import register

    register()
    stock = config()
    made: Callable[[Any], StructuredOutputManager] = StructuredOutputManager
    assert type(made(stock)) is StructuredOutputManager
    monkeypatch.setattr("vllm_medusa.config.medusa_config", lambda engine: engine)
    assert type(made(stock)) is TreeStructuredOutputManager
