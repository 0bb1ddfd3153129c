# SPDX-License-Identifier: Apache-2.0
"""What carries a draft's tree through vLLM to where grammars are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsIndex, overload


class TreeTokens(list[int]):
    """A request's drafted tokens that know their tree.

    A worker hands them to the scheduler in the place of a plain list (``DraftTokenIds.draft_token_ids``). Grammars are
    in the scheduler's process, and whatever vLLM makes of the list on the way, a slice or a pickled copy, is the same
    draft or a prefix of it. So nobody has to keep the trees of waiting requests there.

    Attributes:
        parents: the row of each token's parent, where row 0 is the root and token j is row j + 1; also of tokens that
            have been cut off.
        nodes: which of the tokens that were drafted these are, where some have been left out.

    """

    parents: Sequence[int]
    nodes: Sequence[int] | None

    def __init__(
        self, tokens: Iterable[int] = (), parents: Sequence[int] = (), nodes: Sequence[int] | None = None
    ) -> None:
        super().__init__(tokens)
        self.parents, self.nodes = parents, nodes

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TreeTokens: ...

    def __getitem__(self, index: SupportsIndex | slice) -> int | TreeTokens:
        """Return a token, or the draft of the first tokens."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        if index.start or index.step not in (None, 1):
            raise ValueError(f"{index} is no prefix of a draft")
        return TreeTokens(super().__getitem__(index), self.parents, self.nodes)

    def of_rows(self, rows: Sequence[int]) -> TreeTokens:
        """Return the draft of these rows, ascending and each with its parent; the root stays in any case."""
        if len(rows) == len(self):
            return self
        place = {row: index for index, row in enumerate([0, *rows])}
        nodes = [row - 1 for row in rows]
        return TreeTokens((self[node] for node in nodes), [place[self.parents[node]] for node in nodes], nodes)
