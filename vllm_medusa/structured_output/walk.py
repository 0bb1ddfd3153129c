# SPDX-License-Identifier: Apache-2.0
"""A grammar's walk over a draft tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_medusa.structured_output.tokens import TreeTokens


def paths(draft: TreeTokens) -> Iterator[list[int]]:
    """Yield the rows on the way to each leaf, the root left out."""
    above = [0, *draft.parents[: len(draft)]]
    inner = set(above[1:])
    for leaf in range(1, len(above)):
        if leaf in inner:
            continue
        path = []
        row = leaf
        while row:
            path.append(row)
            row = above[row]
        yield path[::-1]


def reachable_rows(
    grammar: StructuredOutputGrammar, request_id: str, draft: TreeTokens, reads: Sequence[bool]
) -> Iterator[int]:
    """Yield the rows that a grammar lets sampling get to, the root left out, depth first.

    At each of them the grammar stands where the path to the row has brought it; in the end, where it stood before. It
    reads no token behind its end.

    Args:
        grammar: the request's, at the root.
        request_id: for what the grammar logs.
        draft: tokens of the vocabulary.
        reads: for each token, whether the grammar reads it; one that it does not read, it allows.

    """
    children: list[list[int]] = [[] for _ in range(len(draft) + 1)]
    for node in reversed(range(len(draft))):
        children[draft.parents[node]].append(node + 1)
    stack = [(row, 0) for row in children[0]]
    depth = 0  # Tokens that the grammar has read.
    try:
        while stack:
            row, above = stack.pop()
            if depth > above:
                grammar.rollback(depth - above)
                depth = above
            if reads[row - 1] and not grammar.is_terminated():
                token = [draft[row - 1]]
                if not grammar.validate_tokens(token) or not grammar.accept_tokens(request_id, token):
                    continue
                depth += 1
            yield row
            stack.extend((child, depth) for child in children[row])
    finally:
        if depth:
            grammar.rollback(depth)
