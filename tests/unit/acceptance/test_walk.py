# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import VOCABULARY, TokenTree, deterministic, step_of, token_trees
from vllm_medusa.acceptance.exact import Walk, walk
from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import NO_TOKEN

tokens = st.integers(0, VOCABULARY - 1)


@dataclass(frozen=True)
class Case:
    """A batch and, for each request, the tokens that its sampler will draw, one after another."""

    requests: list[TokenTree]
    streams: list[list[int]]
    noise: list[int]

    @property
    def trees(self) -> StepTrees:
        return step_of(self.requests)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests = draw(st.lists(token_trees(), min_size=1, max_size=5))
    levels = step_of(requests).max_depth + 1
    streams = [draw(st.lists(tokens, min_size=levels, max_size=levels)) for _ in requests]
    return Case(requests, streams, [draw(tokens) for _ in requests])


class Sampler:
    """Draws from each request's stream, and only for requests that walk; the others get noise."""

    def __init__(self, case: Case) -> None:
        self.streams = torch.tensor(case.streams)
        self.noise = torch.tensor(case.noise)
        self.draws = torch.zeros(len(case.streams), dtype=torch.int64)
        self.calls = 0

    def __call__(self, row: torch.Tensor, walking: torch.Tensor) -> torch.Tensor:
        next_draw = self.draws.clamp(max=self.streams.shape[1] - 1)
        drawn = self.streams.gather(1, next_draw[:, None]).flatten()
        self.draws += walking
        self.calls += 1
        return torch.where(walking, drawn, self.noise)


def walk_alone(tree: TokenTree, stream: list[int]) -> tuple[list[int], list[int]]:
    """Walk one tree by hand: the emitted tokens, and the rows of the tree that they were drawn at."""
    rows, emitted = [0], []
    for token in stream:
        emitted.append(token)
        child = tree.child(rows[-1], token)
        if child is None:
            break
        rows.append(child)
    return emitted, rows


def emitted_by(result: Walk, request: int) -> tuple[list[int], list[int]]:
    """The columns before the padding; asserts that the rest is padding."""
    length = int(result.lengths[request])
    assert (result.tokens[request, length:] == NO_TOKEN).all()
    assert (result.rows[request, length:] == NO_TOKEN).all()
    return result.tokens[request, :length].tolist(), result.rows[request, :length].tolist()


@deterministic
@given(cases())
def test_a_batch_walks_as_each_request_would_alone(case: Case) -> None:
    trees = case.trees
    result = walk(trees, Sampler(case))
    for request, (tree, stream) in enumerate(zip(case.requests, case.streams, strict=True)):
        emitted, rows = walk_alone(tree, stream)
        first = int(trees.roots[request])
        assert emitted_by(result, request) == (emitted, [first + row for row in rows])
        assert result.stopped_at[request] == first + rows[-1]


@deterministic
@given(cases())
def test_a_request_draws_exactly_as_often_as_it_emits(case: Case) -> None:
    sampler = Sampler(case)
    result = walk(case.trees, sampler)
    assert sampler.draws.tolist() == result.lengths.tolist()
    assert sampler.calls == int(result.lengths.max())


@deterministic
@given(cases())
def test_the_sampler_sees_each_walking_request_at_the_row_where_it_stands(case: Case) -> None:
    trees, sampler, seen = case.trees, Sampler(case), []

    def draw(row: torch.Tensor, walking: torch.Tensor) -> torch.Tensor:
        assert torch.equal(torch.bucketize(row, trees.cu_num_rows, right=True) - 1, torch.arange(len(case.requests)))
        seen.append(torch.where(walking, row, NO_TOKEN))
        return sampler(row, walking)

    assert torch.equal(walk(trees, draw).rows, torch.stack(seen, dim=1))


@deterministic
@given(st.lists(st.builds(TokenTree, st.just([-1]), st.just([0])), min_size=1, max_size=4))
def test_requests_without_a_draft_emit_one_token_each(requests: list[TokenTree]) -> None:
    case = Case(requests, [[2]] * len(requests), [0] * len(requests))
    result = walk(case.trees, Sampler(case))
    assert result.tokens.tolist() == [[2]] * len(requests)
    assert torch.equal(result.stopped_at, case.trees.roots)


@deterministic
@given(st.lists(token_trees(), min_size=1, max_size=4), st.data())
def test_children_finds_the_child_that_carries_the_token(requests: list[TokenTree], data: st.DataObject) -> None:
    trees = step_of(requests)
    row = [data.draw(st.integers(0, len(tree.parents) - 1)) for tree in requests]
    token = [data.draw(tokens) for _ in requests]
    expected = []
    for request, tree in enumerate(requests):
        child = tree.child(row[request], token[request])
        expected.append(-1 if child is None else int(trees.roots[request]) + child)
    assert trees.children(trees.roots + torch.tensor(row), torch.tensor(token)).tolist() == expected
