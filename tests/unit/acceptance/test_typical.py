# SPDX-License-Identifier: Apache-2.0
"""The rule of typical acceptance against a search through all paths of each tree, node by node."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import VOCABULARY, TokenTree, deterministic, step_of, token_trees
from vllm_medusa.acceptance.contract import Acceptance
from vllm_medusa.acceptance.exact import walk
from vllm_medusa.acceptance.typical import Typical, judge_nodes, settle
from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import NO_TOKEN


@dataclass(frozen=True)
class Case:
    """A batch and the target's processed logits at its rows, some of them of tokens that cannot be drawn."""

    requests: list[TokenTree]
    logits: torch.Tensor
    rule: Typical

    @property
    def trees(self) -> StepTrees:
        return step_of(self.requests)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests = draw(st.lists(token_trees(), min_size=1, max_size=5))
    rows = sum(len(tree.parents) for tree in requests)
    # A coarse grid, so that paths tie.
    logit = st.one_of(st.integers(-2, 2).map(float), st.just(-math.inf))
    values = draw(st.lists(st.lists(logit, min_size=VOCABULARY, max_size=VOCABULARY), min_size=rows, max_size=rows))
    logits = torch.tensor(values)
    logits[:, 0] = logits[:, 0].clamp(min=-3)
    fractions = st.sampled_from([0.0, 0.09, 0.3, 0.7, 1.0])
    return Case(requests, logits, Typical(draw(fractions), draw(fractions)))


def judged_by_hand(rule: Typical, logits: list[float], token: int) -> tuple[float, bool]:
    """The token's probability, and whether the paper's rule keeps it."""
    weights = [math.exp(logit) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    threshold = min(rule.threshold, rule.alpha * math.exp(-entropy))
    return probabilities[token], probabilities[token] - threshold > 1e-6


def near_threshold(rule: Typical, logits: list[float], token: int) -> bool:
    """Whether rounding may decide."""
    probability, _ = judged_by_hand(rule, logits, token)
    kept = [judged_by_hand(replace(rule, threshold=rule.threshold + d), logits, token)[1] for d in (-1e-5, 1e-5)]
    kept += [judged_by_hand(replace(rule, alpha=rule.alpha + d), logits, token)[1] for d in (-1e-5, 1e-5)]
    return len(set(kept)) > 1 and probability > 0


def kept_paths(case: Case, tree: TokenTree, logits: list[list[float]]) -> list[tuple[list[int], float]]:
    """Every path of kept nodes from the root, as rows of the tree, with the product of its probabilities."""
    paths = [([0], 1.0)]
    for row in range(1, len(tree.parents)):
        for path, product in list(paths):
            if path[-1] == tree.parents[row]:
                probability, kept = judged_by_hand(case.rule, logits[path[-1]], tree.tokens[row])
                if kept:
                    paths.append(([*path, row], product * probability))
    return paths


@deterministic
@given(case=cases())
def test_each_request_settles_its_longest_kept_path_and_of_those_the_most_probable(case: Case) -> None:
    trees = case.trees
    log_probs, entropies = judge_nodes(trees, case.logits)
    settled = settle(trees, case.rule.keeps(log_probs, entropies), log_probs)
    for tree, first in zip(case.requests, trees.roots.tolist(), strict=True):
        rows = case.logits[first : first + len(tree.parents)].tolist()
        if any(
            near_threshold(case.rule, rows[above], token)
            for above, token in zip(tree.parents[1:], tree.tokens[1:], strict=True)
        ):
            continue
        paths = kept_paths(case, tree, rows)
        longest = max(len(path) for path, _ in paths)
        most = max(product for path, product in paths if len(path) == longest)
        own = settled[first : first + len(tree.parents)].tolist()
        path = [0]
        while own[path[-1]] != NO_TOKEN:
            child = tree.child(path[-1], own[path[-1]])
            assert child is not None
            path.append(child)
        products = {tuple(rows): product for rows, product in paths}
        assert tuple(path) in products
        assert len(path) == longest
        assert products[tuple(path)] == pytest.approx(most, rel=1e-5)
        assert sum(token != NO_TOKEN for token in own) == len(path) - 1


def settled_of(rule: Acceptance, trees: StepTrees, logits: torch.Tensor) -> torch.Tensor:
    log_probs, entropies = judge_nodes(trees, logits)
    return settle(trees, rule.keeps(log_probs, entropies), log_probs)


@deterministic
@given(case=cases(), drawn=st.lists(st.integers(0, VOCABULARY - 1), min_size=60, max_size=60))
def test_a_rule_that_keeps_nothing_walks_as_the_exact_one(case: Case, drawn: list[int]) -> None:
    trees, draws = case.trees, torch.tensor(drawn)
    # No token is more probable than exp(-entropy) of a flat distribution.
    settled = settled_of(Typical(threshold=1.0, alpha=1.0), trees, torch.zeros_like(case.logits))
    assert (settled == NO_TOKEN).all()
    exact = walk(trees, lambda row, _: draws[row])
    found = walk(trees, lambda row, _: torch.where(settled[row] >= 0, settled[row], draws[row]))
    assert torch.equal(found.tokens, exact.tokens)


@deterministic
@given(case=cases())
def test_where_one_token_can_be_drawn_the_rule_keeps_it_and_no_other(case: Case) -> None:
    trees = case.trees
    only = torch.where(case.logits == case.logits.amax(dim=1, keepdim=True), 0.0, -math.inf)
    only[(only == 0).cumsum(dim=1) > 1] = -math.inf
    settled = settled_of(Typical(0.09, 0.3), trees, only)
    draws = only.argmax(dim=1)
    exact = walk(trees, lambda row, _: draws[row])
    found = walk(trees, lambda row, _: torch.where(settled[row] >= 0, settled[row], draws[row]))
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.equal(found.rows, exact.rows)


def test_nothing_is_kept_below_a_node_that_is_not_nor_a_node_without_a_token() -> None:
    trees = step_of([TokenTree([-1, 0, 1], [0, 1, 2]), TokenTree([-1, 0], [0, NO_TOKEN])])
    kept = torch.tensor([True, False, True, True, True])
    assert (settle(trees, kept, torch.zeros(5)) == NO_TOKEN).all()


def test_logits_that_are_no_numbers_keep_nothing() -> None:
    trees = step_of([TokenTree([-1, 0], [0, 1])])
    assert (settled_of(Typical(0.09, 0.3), trees, torch.full((2, VOCABULARY), torch.nan)) == NO_TOKEN).all()
