# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import deterministic, path_to, trees
from vllm_medusa.attention.reference import tree_attention
from vllm_medusa.tree.topology import DraftTree

SCALE = 0.7


@dataclass(frozen=True)
class Inputs:
    """A tree and random tensors for it."""

    tree: DraftTree
    query: torch.Tensor
    key_context: torch.Tensor
    value_context: torch.Tensor
    key_tree: torch.Tensor
    value_tree: torch.Tensor

    def attend(self, **options: object) -> torch.Tensor:
        tensors = (self.query, self.key_context, self.value_context, self.key_tree, self.value_tree)
        return tree_attention(*tensors, self.tree.ancestors, SCALE, **options)


def random_inputs(tree: DraftTree, context: int, kv_heads: int, group: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 4, generator=generator, dtype=torch.float64)

    past, rows = (context, kv_heads), (len(tree), kv_heads)
    query = random(len(tree), kv_heads * group)
    return Inputs(tree, query, random(*past), random(*past), random(*rows), random(*rows))


inputs = st.builds(
    random_inputs,
    trees(max_rows=12),
    st.integers(0, 6),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 9),
)


def last_token_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    soft_cap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of a sequence's last token, head by head: it sees the last ``window`` tokens."""
    key, value = (key, value) if window is None else (key[-window:], value[-window:])
    group = query.shape[0] // key.shape[1]
    output = []
    for head, head_query in enumerate(query):
        scores = SCALE * (key[:, head // group] @ head_query)
        scores = scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()
        output.append(scores.softmax(dim=0) @ value[:, head // group])
    return torch.stack(output)


@deterministic
@given(inputs, st.none() | st.floats(0.5, 5), st.none() | st.integers(1, 8))
def test_every_row_attends_as_if_its_path_alone_followed_the_context(
    case: Inputs, soft_cap: float | None, window: int | None
) -> None:
    output = case.attend(soft_cap=soft_cap, sliding_window=window)
    for row in range(len(case.tree)):
        path = path_to(case.tree, row)
        key = torch.cat([case.key_context, case.key_tree[path]])
        value = torch.cat([case.value_context, case.value_tree[path]])
        expected = last_token_attention(case.query[row], key, value, soft_cap, window)
        torch.testing.assert_close(output[row], expected)


@deterministic
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 9))
def test_a_chain_is_causal_attention(context: int, depth: int, seed: int) -> None:
    case = random_inputs(DraftTree.chain(depth), context, kv_heads=2, group=2, seed=seed)
    causal = torch.ones(depth + 1, context + depth + 1, dtype=torch.bool).tril(context)
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.query.transpose(0, 1),
        torch.cat([case.key_context, case.key_tree]).transpose(0, 1),
        torch.cat([case.value_context, case.value_tree]).transpose(0, 1),
        attn_mask=causal,
        scale=SCALE,
        enable_gqa=True,
    ).transpose(0, 1)
    torch.testing.assert_close(case.attend(), expected)


@deterministic
@given(inputs, st.none() | st.integers(1, 8))
def test_depths_need_not_be_given(case: Inputs, window: int | None) -> None:
    given_depths = case.attend(sliding_window=window, depths=case.tree.depths)
    assert torch.equal(given_depths, case.attend(sliding_window=window))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_type_of_the_query_and_is_computed_in_at_least_float32(dtype: torch.dtype) -> None:
    case = random_inputs(DraftTree.from_parents([-1, 0, 0, 1]), context=3, kv_heads=1, group=2)
    tensors = (case.query, case.key_context, case.value_context, case.key_tree, case.value_tree)
    rounded = Inputs(case.tree, *(tensor.to(dtype) for tensor in tensors))
    exact = Inputs(case.tree, *(tensor.to(dtype).double() for tensor in tensors))
    output = rounded.attend()
    assert output.dtype == dtype
    expected = exact.attend().to(dtype)
    torch.testing.assert_close(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
