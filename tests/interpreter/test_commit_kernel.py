# SPDX-License-Identifier: Apache-2.0
"""The KV commit in one launch against the moves that the step asks for."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.strategies import TokenTree, deterministic, path_to, step_of, trees
from vllm_medusa.acceptance.exact import Walk
from vllm_medusa.kv_cache.backend_commit import misplaced_rows
from vllm_medusa.kv_cache.kernel_commit import CacheTable, KernelCommit, move_accepted
from vllm_medusa.tree.topology import DraftTree


@dataclass(frozen=True)
class Accepted:
    """A tree and the row at which its request stopped."""

    tree: DraftTree
    last_row: int


@dataclass(frozen=True)
class Layout:
    """The shape of a slot, and which of its sizes comes first in memory."""

    kv_heads: int
    content: int
    block_size: int
    dtype: torch.dtype
    heads_first: bool

    def cache(self, blocks: int, generator: torch.Generator) -> torch.Tensor:
        """``[blocks, block_size, kv_heads, content]``, random bytes."""
        sizes = (self.kv_heads, self.block_size) if self.heads_first else (self.block_size, self.kv_heads)
        shape = (blocks, *sizes, self.content * self.dtype.itemsize)
        cache = torch.randint(256, shape, generator=generator, dtype=torch.uint8).view(self.dtype)
        return cache.transpose(1, 2) if self.heads_first else cache


@st.composite
def accepted(draw: st.DrawFn) -> Accepted:
    tree = draw(trees(max_rows=24))
    return Accepted(tree, draw(st.integers(0, len(tree) - 1)))


layouts = st.builds(
    Layout,
    kv_heads=st.integers(1, 3),
    content=st.sampled_from([16, 32, 84, 7]),
    block_size=st.sampled_from([4, 16]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn]),
    heads_first=st.booleans(),
)


def raw(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.uint8)


@settings(deterministic, max_examples=40)
@given(st.lists(accepted(), min_size=1, max_size=4), st.lists(layouts, min_size=1, max_size=2), st.integers(0, 99))
def test_accepted_rows_move_behind_their_roots_in_every_layer(
    requests: list[Accepted], layouts: list[Layout], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    step = step_of([TokenTree(each.tree.parents.tolist(), [0] * len(each.tree)) for each in requests])
    rows = torch.full((len(requests), step.max_depth + 1), -1)
    for index, each in enumerate(requests):
        path = torch.tensor(path_to(each.tree, each.last_row))
        rows[index, : len(path)] = step.roots[index] + path
    tokens = len(step.parents) + 5
    token = torch.randperm(tokens, generator=generator)[: len(step.parents)].sort().values
    step = replace(step, logits_indices=token)
    accepted = Walk.along(step, rows, rows)
    slots = torch.randperm(4 * tokens, generator=generator)[:tokens]
    caches = [layout.cache(tokens, generator) for layout in layouts for _ in range(2)]

    source, destination = (slots[token[each]] for each in misplaced_rows(step, accepted))
    expected = []
    for cache in caches:
        moved, size = raw(cache).clone(), cache.shape[1]
        moved[destination // size, destination % size] = moved[source // size, source % size].clone()
        expected.append(moved)

    tables = CacheTable.group([*caches, caches[0]])  # One layer shares another's cache.
    assert len(tables) <= len(layouts)
    assert sum(len(table.addresses) for table in tables) == len(caches)
    for table in tables:
        move_accepted(table, step, accepted, slots)
    for cache, moved in zip(caches, expected, strict=True):
        assert torch.equal(raw(cache), moved)


def test_a_commit_keeps_no_cache_alive() -> None:
    """vLLM profiles CUDA graphs with a small cache, which must be gone before it allocates the real one."""
    memory = np.zeros((4, 2, 16, 32), dtype=np.float32)
    layer = SimpleNamespace(kv_cache=torch.from_numpy(memory))
    commit = KernelCommit(SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])]), {"layer": layer})
    freed = weakref.ref(memory)
    del memory, layer
    assert commit is not None
    assert freed() is None


@pytest.mark.parametrize(
    ("dtype", "content", "word"),
    [
        (torch.bfloat16, 256, torch.int64),
        (torch.float8_e4m3fn, 2 * 84, torch.int64),
        (torch.bfloat16, 6, torch.int32),
        (torch.bfloat16, 7, torch.int16),
        (torch.float8_e4m3fn, 7, torch.uint8),
    ],
)
def test_bytes_move_in_the_widest_words_that_fit(dtype: torch.dtype, content: int, word: torch.dtype) -> None:
    (table,) = CacheTable.group([torch.zeros(2, 16, 3, content).to(dtype)])
    assert table.layout.dtype == word
