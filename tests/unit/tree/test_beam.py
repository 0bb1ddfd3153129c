# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.levels import Asked

Path = tuple[int, ...]


@dataclass
class TableHeads:
    """Heads whose children's probabilities depend on the whole path; a token tells its rank.

    Attributes:
        num_reqs: requests.
        seed: determines all probabilities.
        paths: of each request, the paths of the nodes that were asked for last.

    """

    num_reqs: int
    seed: int
    paths: list[list[Path]] = field(default_factory=list)

    def log_probs(self, request: int, path: Path, top_k: int) -> torch.Tensor:
        """Return sorted log-probabilities, equal ones and zeros among them."""
        generator = torch.Generator().manual_seed(hash((self.seed, request, path)) % 2**31)
        share = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0])[torch.randint(5, (top_k,), generator=generator)]
        return share.sort(descending=True).values.log()

    def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if asked.parents is None:
            self.paths = [[()] for _ in range(self.num_reqs)]
        else:
            self.paths = [
                [(*own[parent], token) for token, parent in zip(tokens, parents, strict=True)]
                for own, tokens, parents in zip(self.paths, asked.tokens.tolist(), asked.parents.tolist(), strict=True)
            ]
        log_probs = [[self.log_probs(i, path, top_k) for path in own] for i, own in enumerate(self.paths)]
        tokens = torch.arange(top_k).expand(self.num_reqs, asked.tokens.shape[1], -1)
        return torch.stack([torch.stack(each) for each in log_probs]), tokens


def paths_of(tokens: torch.Tensor, parents: torch.Tensor) -> list[Path]:
    paths: list[Path] = [()]
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def score_of(heads: TableHeads, request: int, path: Path, top_k: int) -> float:
    """Return the logarithm of a path's probability."""
    return float(sum(heads.log_probs(request, path[:depth], top_k)[token] for depth, token in enumerate(path)))


def best_first(heads: TableHeads, request: int, depth: int, nodes: int, top_k: int) -> float:
    """Return the summed probability of the tree of the ``nodes`` most probable paths."""
    total, frontier = 0.0, [(0.0, ())]
    for _ in range(nodes + 1):
        negated, path = heapq.heappop(frontier)
        total += math.exp(-negated)
        if len(path) < depth:
            for rank, log_prob in enumerate(heads.log_probs(request, path, top_k).tolist()):
                heapq.heappush(frontier, (negated - log_prob, (*path, rank)))
    return total - 1


@st.composite
def trees(draw: st.DrawFn, beam: int | None = None) -> BeamTree:
    heads, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    width = beam or draw(st.integers(1, 5))
    nodes = draw(st.integers(1, min(16, top_k + min(width, top_k) * (heads - 1))))
    return BeamTree(heads, nodes, top_k, width, draw(st.sampled_from([0.0, 0.05, 0.3])))


@deterministic
@given(tree=trees(), num_reqs=st.integers(1, 3), seed=st.integers(0, 1000))
def test_a_draft_holds_different_paths_with_parents_first_and_their_probabilities(
    tree: BeamTree, num_reqs: int, seed: int
) -> None:
    heads = TableHeads(num_reqs, seed)

    drafts = tree.draft(heads, torch.zeros(num_reqs, dtype=torch.int64))

    for request in range(num_reqs):
        length = int(drafts.lengths[request])
        assert drafts.log_probs is not None
        tokens, parents, scores = (each[request] for each in (drafts.tokens, drafts.parents, drafts.log_probs))
        assert all(parent <= node for node, parent in enumerate(parents.tolist()))
        paths = paths_of(tokens, parents)
        assert len(set(paths[:length])) == length
        for path, score in zip(paths[:length], scores.tolist(), strict=False):
            assert score == pytest.approx(score_of(heads, request, path, tree.top_k), abs=1e-5)
        assert scores[:length].tolist() == sorted(scores[:length].tolist(), reverse=True)
        if tree.min_probability:
            assert bool((scores[:length] >= math.log(tree.min_probability)).all())


@deterministic
@given(tree=trees(beam=4**3), num_reqs=st.integers(1, 2), seed=st.integers(0, 1000))
def test_a_beam_that_holds_every_node_gives_the_best_tree(tree: BeamTree, num_reqs: int, seed: int) -> None:
    heads = TableHeads(num_reqs, seed)

    drafts = tree.draft(heads, torch.zeros(num_reqs, dtype=torch.int64))

    assert drafts.log_probs is not None
    for request in range(num_reqs):
        kept = drafts.log_probs[request].exp()
        best = best_first(heads, request, tree.depth, tree.num_nodes, tree.top_k)
        if not tree.min_probability:
            assert float(kept.sum()) == pytest.approx(best, abs=1e-4)


@deterministic
@given(
    tree=trees(),
    num_reqs=st.integers(1, 3),
    seed=st.integers(0, 1000),
    least_parent=st.sampled_from([0.05, 0.2, 0.4, 0.9]),
)
def test_a_tree_without_children_of_improbable_nodes_holds_every_node_that_is_as_probable(
    tree: BeamTree, num_reqs: int, seed: int, least_parent: float
) -> None:
    roots = torch.zeros(num_reqs, dtype=torch.int64)

    whole = tree.draft(TableHeads(num_reqs, seed), roots)
    drafts = tree.draft(TableHeads(num_reqs, seed), roots, least_parent)

    assert drafts.tokens.shape == drafts.parents.shape == whole.tokens.shape
    assert drafts.log_probs is not None
    assert whole.log_probs is not None
    assert all(parent <= node for row in drafts.parents.tolist() for node, parent in enumerate(row))
    for request in range(num_reqs):
        kept = int((whole.log_probs[request] >= math.log(least_parent)).sum())
        assert torch.equal(drafts.log_probs[request, :kept], whole.log_probs[request, :kept])
        length = int(drafts.lengths[request])
        paths = paths_of(drafts.tokens[request], drafts.parents[request])[:length]
        assert len(set(paths)) == length
        heads = TableHeads(num_reqs, seed)
        for path, score in zip(paths, drafts.log_probs[request].tolist(), strict=False):
            assert score == pytest.approx(score_of(heads, request, path, tree.top_k), abs=1e-5)


def test_heads_are_asked_for_no_more_nodes_and_levels_than_some_request_has_probable_parents() -> None:
    class Sure(TableHeads):
        """The first request's heads are sure of their first two tokens, the second one's of none."""

        asked: list[int]

        def log_probs(self, request: int, path: Path, top_k: int) -> torch.Tensor:
            sure = request == 0 and len(path) < 2
            return torch.tensor([0.9, 0.1, 0.0] if sure else [0.2, 0.2, 0.1]).log()

        def top_predictions(self, asked: Asked, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.asked.append(asked.tokens.shape[1])
            return super().top_predictions(asked, top_k)

    tree, roots = BeamTree(4, 9, 3, 3, 0.0), torch.zeros(2, dtype=torch.int64)
    for least_parent, widths in ((0.0, [1, 3, 3, 3]), (0.15, [1, 2, 1, 2]), (0.5, [1, 1, 1]), (0.95, [1])):
        heads = Sure(2, 0)
        heads.asked = []
        drafts = tree.draft(heads, roots, least_parent)
        assert heads.asked == widths
        assert drafts.tokens.shape == (2, 9)


def test_heads_that_predict_no_numbers_draft_nothing() -> None:
    class Broken(TableHeads):
        def log_probs(self, request: int, path: Path, top_k: int) -> torch.Tensor:
            return torch.full((top_k,), math.nan)

    drafts = BeamTree(3, 5, 4, 2, 0.0).draft(Broken(2, 0), torch.zeros(2, dtype=torch.int64))

    assert drafts.lengths.tolist() == [0, 0]
    assert all(parent <= node for row in drafts.parents.tolist() for node, parent in enumerate(row))


def test_more_nodes_than_the_beam_can_find_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 heads give trees of at most 6 nodes where 1 of a depth .* not 7"):
        BeamTree(2, 7, 3, 1, 0.0)


@deterministic
@given(st.data())
def test_a_tree_on_another_device_drafts_the_same(data: st.DataObject) -> None:
    tree = data.draw(trees())
    moved = tree.to(torch.device("cpu"))
    own, other = (each.draft(TableHeads(1, 3), torch.zeros(1, dtype=torch.int64)) for each in (tree, moved))
    assert own.tokens.tolist() == other.tokens.tolist()
