from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import VOCABULARY, batch_of, deterministic, token_trees, trees
from vllm_medusa.acceptance.exact import walk
from vllm_medusa.step.plan import StepPlan, kv_moves, plan_step
from vllm_medusa.tree.layout import TreeStack, TreeTable
from vllm_medusa.tree.topology import DraftTree


@dataclass(frozen=True)
class Request:
    """One request of a step: tokens that are computed without a tree, then the rows of a prefix of a table's tree."""

    kind: int
    rows: int
    before: int
    cached: int

    @property
    def context(self) -> int:
        """Tokens before the root."""
        return self.cached + self.before


@dataclass(frozen=True)
class Case:
    table: list[DraftTree]
    requests: list[Request]

    def tree(self, request: Request) -> DraftTree:
        return self.table[request.kind].prefix(request.rows)

    def tokens_of(self, index: int) -> list[int]:
        """The indices, among the step's tokens, of the rows of a request."""
        first = sum(request.before + request.rows for request in self.requests[:index]) + self.requests[index].before
        return list(range(first, first + self.requests[index].rows))

    @property
    def token_ids(self) -> torch.Tensor:
        total = sum(request.before + request.rows for request in self.requests)
        return torch.arange(total, dtype=torch.int32) * 7 + 3

    def plan(self) -> StepPlan:
        return plan_step(
            TreeTable(self.table).layout(
                [request.kind for request in self.requests], [request.rows - 1 for request in self.requests]
            ),
            token=torch.tensor([token for index in range(len(self.requests)) for token in self.tokens_of(index)]),
            token_ids=self.token_ids,
            seq_lens=torch.tensor([request.context + request.rows for request in self.requests], dtype=torch.int32),
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    table = draw(st.lists(trees(), min_size=1, max_size=3))
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.integers(0, len(table) - 1))
        rows = draw(st.integers(1, len(table[kind])))
        requests.append(Request(kind, rows, before=draw(st.integers(0, 4)), cached=draw(st.integers(0, 40))))
    return Case(table, requests)


def branches(tree: DraftTree) -> bool:
    return any(parent != row - 1 for row, parent in enumerate(tree.parents.tolist()))


def depth_of(tree: DraftTree, row: int) -> int:
    return len(tree.path(row)) - 1


@deterministic
@given(cases())
def test_rows_lie_request_by_request_with_the_parents_and_depths_of_their_tree(case: Case) -> None:
    plan = case.plan()
    row = 0
    for index, request in enumerate(case.requests):
        tree, first = case.tree(request), row
        assert plan.trees.root[index] == first
        for local, token in enumerate(case.tokens_of(index)):
            parent = int(tree.parents[local])
            assert plan.trees.request[row] == index
            assert plan.trees.parent[row] == (first + parent if local else -1)
            assert plan.trees.token[row] == case.token_ids[token]
            assert plan.token[row] == token
            assert plan.rows.layout.depth[row] == depth_of(tree, local)
            row += 1
    assert len(plan.trees.parent) == len(plan.rows.layout.depth) == row
    assert plan.trees.max_depth == max(case.tree(request).depth for request in case.requests)


@deterministic
@given(cases())
def test_attention_sees_exactly_the_trees_that_branch(case: Case) -> None:
    queries = case.plan().rows.queries
    branching = [index for index, request in enumerate(case.requests) if branches(case.tree(request))]
    if queries is None:
        assert branching == []
        return
    assert queries.request.tolist() == branching
    assert queries.context.tolist() == [case.requests[index].context for index in branching]


@deterministic
@given(cases())
def test_a_row_attends_to_its_path_and_has_the_position_of_its_depth(case: Case) -> None:
    queries = case.plan().rows.queries
    if queries is None:
        return
    for slot, index in enumerate(queries.request.tolist()):
        tree, rows = case.tree(case.requests[index]), case.requests[index].rows
        assert queries.token[slot, :rows].tolist() == case.tokens_of(index)
        for row in range(rows):
            assert queries.ancestors[slot, row].nonzero().flatten().tolist() == tree.path(row)
            assert queries.depth[slot, row] == depth_of(tree, row)


@deterministic
@given(cases())
def test_padding_repeats_the_last_row_and_no_row_sees_padding(case: Case) -> None:
    queries = case.plan().rows.queries
    if queries is None:
        return
    widest = max(case.requests[index].rows for index in queries.request.tolist())
    assert queries.token.shape[1] == widest
    for slot, index in enumerate(queries.request.tolist()):
        last = case.requests[index].rows - 1
        for padding in range(last + 1, widest):
            assert queries.token[slot, padding] == queries.token[slot, last]
            assert queries.depth[slot, padding] == queries.depth[slot, last]
            assert torch.equal(queries.ancestors[slot, padding], queries.ancestors[slot, last])
            assert not queries.ancestors[slot, :, padding].any()


@deterministic
@given(st.lists(trees(), min_size=1, max_size=4))
def test_a_stack_knows_how_far_each_tree_is_a_chain(table: list[DraftTree]) -> None:
    for tree, chain_rows in zip(table, TreeStack.of(table).chain_rows.tolist(), strict=True):
        assert chain_rows == max(rows for rows in range(1, len(tree) + 1) if not branches(tree.prefix(rows)))


@deterministic
@given(st.lists(token_trees(), min_size=1, max_size=5), st.data())
def test_accepted_rows_move_to_where_a_sequence_has_them(requests: list, data: st.DataObject) -> None:
    batch = batch_of(requests)
    draws = [
        torch.tensor([data.draw(st.integers(0, VOCABULARY - 1)) for _ in requests]) for _ in range(batch.max_depth + 1)
    ]
    accepted = walk(batch, lambda row, walking: draws.pop(0))
    source, target = kv_moves(batch, accepted.rows)
    cache = torch.arange(len(batch.parent))  # the row whose keys each slot holds
    cache[target] = cache[source]
    for index, root in enumerate(batch.root.tolist()):
        path = [row for row in accepted.rows[index].tolist() if row >= 0]
        assert cache[root : root + len(path)].tolist() == path
    assert not (source == target).any()
    assert len(set(target.tolist())) == len(target)


@deterministic
@given(st.integers(1, 4), st.integers(0, 6))
def test_an_accepted_chain_moves_nothing(requests: int, depth: int) -> None:
    request = Request(0, depth + 1, before=0, cached=5)
    plan = Case([DraftTree.chain(depth)], [request] * requests).plan()
    rows = plan.trees.root[:, None] + torch.arange(depth + 1)
    assert [len(moves) for moves in kv_moves(plan.trees, rows)] == [0, 0]
    assert plan.rows.queries is None


@deterministic
@given(cases())
def test_rows_are_placed_at_the_position_of_their_depth_and_other_tokens_stay(case: Case) -> None:
    chain = torch.cat([torch.arange(r.cached, r.context + r.rows) for r in case.requests])
    placed = chain.clone()
    case.plan().place(placed)
    for index, request in enumerate(case.requests):
        for local, token in enumerate(case.tokens_of(index)):
            assert placed[token] == request.context + depth_of(case.tree(request), local)
            chain[token] = placed[token]
    assert torch.equal(placed, chain)


@deterministic
@given(cases())
def test_the_bitmask_of_a_row_holds_its_path(case: Case) -> None:
    words = case.plan().rows.layout.words.tolist()
    for request in case.requests:
        for local in range(request.rows):
            bits = [63 * index + bit for index, word in enumerate(words.pop(0)) for bit in range(63) if word >> bit & 1]
            assert bits == case.tree(request).path(local)


def test_a_layout_asked_for_again_is_the_same_one() -> None:
    table = TreeTable([DraftTree.chain(2), DraftTree.from_parents([-1, 0, 0])])
    assert table.layout([0, 1], [2, 1]) is table.layout((0, 1), [2, 1])
    assert table.layout([0, 1], [2, 1]) is not table.layout([0, 1], [2, 2])
