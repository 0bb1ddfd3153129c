# SPDX-License-Identifier: Apache-2.0
"""The correction for GPUs: what ``correction.py`` does, on what stays on the device, in a launch for each direction.

Nothing is added up in an order that may change, so all ranks have the same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_medusa.budget.correction import HORIZON, PRIOR
from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import Drafts

BLOCK = 1024
"""Rows that a program takes in at once."""


class DeviceCorrection:
    """Turns what heads say of their drafts into confidences, and learns from what is accepted.

    Args:
        max_depth: the deepest node's depth.
        num_nodes: nodes of the largest draft.
        max_num_reqs: requests that the states hold.
        device: where the drafts are.

    Attributes:
        expected: ``[max_depth + 1]``, float32: accepted nodes of each depth that the heads expected, those of late.
        accepted: ``[max_depth + 1]``, float32: those that were.
        said: ``[max_num_reqs, num_nodes]``, float32: uncorrected probabilities of waiting drafts, by state index.

    """

    def __init__(self, max_depth: int, num_nodes: int, max_num_reqs: int, device: torch.device) -> None:
        self.expected, self.accepted = torch.zeros(2, max_depth + 1, device=device)
        self.said = torch.zeros(max_num_reqs, num_nodes, device=device)
        self._max_depth = max_depth

    def rate(
        self,
        drafts: Drafts,
        idx_mapping: torch.Tensor,  # [num_reqs], int64
        confidences: torch.Tensor,  # [num_reqs, num_nodes], float32
    ) -> None:
        """Write drafts' confidences, the form in which vLLM's adaptive verification reads probabilities.

        A node's confidence is its corrected probability divided by that of the node before it, so the running product
        of confidences is the corrected probability. Beforehand no node is let be more probable than one before it.
        Confidences are in [0, 1], and 0 past the draft's length.

        Args:
            drafts: with their ``log_probs``.
            idx_mapping: each draft's state index, where what the heads said is kept for ``observe``.
            confidences: where they go.

        """
        assert drafts.log_probs is not None
        num_reqs, num_nodes = drafts.parents.shape
        _rate_kernel[(num_reqs,)](
            drafts.log_probs,
            drafts.parents,
            drafts.lengths,
            idx_mapping,
            self.expected,
            self.accepted,
            self.said,
            confidences,
            num_nodes,
            self._max_depth,
            PRIOR,
            drafts.log_probs.stride(0),
            drafts.parents.stride(0),
            drafts.lengths.stride(0),
            padded_nodes=triton.next_power_of_2(num_nodes),
            num_warps=1,
        )

    def forget(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs], int64
        confidences: torch.Tensor,  # [num_reqs, num_nodes], float32
    ) -> None:
        """Do what ``rate`` does for requests that have no draft."""
        self.said.index_fill_(0, idx_mapping, 0)
        confidences.zero_()

    def observe(
        self,
        trees: StepTrees,
        lengths: torch.Tensor,  # [num_reqs], int32
        idx_mapping: torch.Tensor,  # [num_reqs], int64
        expanded_idx_mapping: torch.Tensor,  # [num_rows], int64
        local_positions: torch.Tensor,  # [num_rows], int32
        prefill_len: torch.Tensor,  # [max_num_reqs], int32
    ) -> None:
        """Learn from a step's rows.

        Drafts behind a prompt are left out: the scheduler has made them up.

        Args:
            trees: the step's trees.
            lengths: ``Walk.lengths``.
            idx_mapping: each request's state index.
            expanded_idx_mapping: each row's state index.
            local_positions: each row's place in its tree, 0 for roots.
            prefill_len: tokens that each request had when it came, by state index.

        """
        _observe_kernel[(self._max_depth,)](
            self.expected,
            self.accepted,
            self.said,
            lengths,
            idx_mapping,
            trees.root_positions,
            prefill_len,
            expanded_idx_mapping,
            local_positions,
            trees.logits_indices,
            trees.depths,
            trees.positions,
            len(lengths),
            len(trees.logits_indices),
            1 - 1 / HORIZON,
            self.said.stride(0),
            block=BLOCK,
            num_warps=4,
        )


@triton.jit
def _least(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.minimum(a, b)


@triton.jit
def _corrected(
    row: tl.tensor,  # [padded_nodes], from 1 on
    length: tl.tensor,
    log_probs: tl.tensor,  # pointer to [num_nodes]
    parents: tl.tensor,  # pointer to [num_nodes]
    expected_ptr: tl.tensor,  # [max_depth + 1]
    accepted_ptr: tl.tensor,  # [max_depth + 1]
    max_depth: tl.tensor,
    prior: tl.tensor,
) -> tl.tensor:  # [padded_nodes]
    """Return rows' probabilities by what was accepted at their depths; 0 past the draft's length."""
    is_node = (row > 0) & (row <= length)
    depth = row * 0
    above = tl.where(is_node, row, 0).to(tl.int64)
    for _ in tl.range(0, max_depth):
        depth += (above > 0).to(tl.int32)
        above = tl.load(parents + above - 1, mask=above > 0, other=0)
    ratio = (tl.load(accepted_ptr + depth) + prior) / (tl.load(expected_ptr + depth) + prior)
    said = tl.exp(tl.load(log_probs + row - 1, mask=is_node, other=float("-inf")))
    return tl.minimum(said * ratio, 1.0)


@triton.jit(do_not_specialize=["num_nodes", "max_depth", "log_probs_stride", "parents_stride", "lengths_stride"])
def _rate_kernel(
    log_probs_ptr: tl.tensor,  # [num_reqs, num_nodes]
    parents_ptr: tl.tensor,  # [num_reqs, num_nodes]
    lengths_ptr: tl.tensor,  # [num_reqs]
    idx_mapping_ptr: tl.tensor,  # [num_reqs]
    expected_ptr: tl.tensor,  # [max_depth + 1]
    accepted_ptr: tl.tensor,  # [max_depth + 1]
    said_ptr: tl.tensor,  # [max_num_reqs, num_nodes]
    confidences_ptr: tl.tensor,  # [num_reqs, num_nodes]
    num_nodes: tl.tensor,
    max_depth: tl.tensor,
    prior: tl.tensor,
    log_probs_stride: tl.tensor,
    parents_stride: tl.tensor,
    lengths_stride: tl.tensor,
    padded_nodes: tl.constexpr,
) -> None:
    """Rate one request's draft."""
    request = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, padded_nodes)
    length = tl.load(lengths_ptr + request * lengths_stride).to(tl.int32)
    log_probs, parents = log_probs_ptr + request * log_probs_stride, parents_ptr + request * parents_stride
    # Each node's own probability, and the least of those before it, which none is to exceed.
    own = _corrected(node + 1, length, log_probs, parents, expected_ptr, accepted_ptr, max_depth, prior)
    one_before = _corrected(node, length, log_probs, parents, expected_ptr, accepted_ptr, max_depth, prior)
    before = tl.associative_scan(tl.where(node == 0, 1.0, one_before), 0, _least)
    confidence = tl.where(before > 0, tl.minimum(own, before) / tl.where(before > 0, before, 1.0), 0.0)
    tl.store(confidences_ptr + request * num_nodes + node, confidence, mask=node < num_nodes)
    said = tl.exp(tl.load(log_probs + node, mask=node < length, other=float("-inf")))
    state = tl.load(idx_mapping_ptr + request)
    tl.store(said_ptr + state * num_nodes + node, said, mask=node < num_nodes)


@triton.jit(do_not_specialize=["num_reqs", "num_rows", "said_stride"])
def _observe_kernel(
    expected_ptr: tl.tensor,  # [max_depth + 1]
    accepted_ptr: tl.tensor,  # [max_depth + 1]
    said_ptr: tl.tensor,  # [max_num_reqs, num_nodes]
    lengths_ptr: tl.tensor,  # [num_reqs]
    idx_mapping_ptr: tl.tensor,  # [num_reqs]
    root_positions_ptr: tl.tensor,  # [num_reqs]
    prefill_len_ptr: tl.tensor,  # [max_num_reqs]
    expanded_idx_mapping_ptr: tl.tensor,  # [num_rows]
    local_positions_ptr: tl.tensor,  # [num_rows]
    logits_indices_ptr: tl.tensor,  # [num_rows]
    depths_ptr: tl.tensor,  # [num_tokens]
    positions_ptr: tl.tensor,  # [num_rows]
    num_reqs: tl.tensor,
    num_rows: tl.tensor,
    decay: tl.tensor,
    said_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Add one depth's rows up."""
    depth = tl.program_id(0) + 1
    expected = tl.zeros([block], tl.float32)
    for start in tl.range(0, num_rows, block):
        row = start + tl.arange(0, block)
        is_row = row < num_rows
        state = tl.load(expanded_idx_mapping_ptr + row, mask=is_row, other=0).to(tl.int64)
        node = tl.load(local_positions_ptr + row, mask=is_row, other=0) - 1
        token = tl.load(logits_indices_ptr + row, mask=is_row, other=0).to(tl.int64)
        row_depth = tl.load(depths_ptr + token, mask=is_row, other=0)
        root = tl.load(positions_ptr + row, mask=is_row, other=0) - row_depth
        is_drafted = root >= tl.load(prefill_len_ptr + state, mask=is_row, other=0)
        counts = is_row & (node >= 0) & (row_depth == depth) & is_drafted
        expected += tl.load(said_ptr + state * said_stride + node, mask=counts, other=0.0)
    accepted = tl.zeros([block], tl.float32)
    for start in tl.range(0, num_reqs, block):
        request = start + tl.arange(0, block)
        is_request = request < num_reqs
        state = tl.load(idx_mapping_ptr + request, mask=is_request, other=0)
        root = tl.load(root_positions_ptr + request, mask=is_request, other=0)
        is_drafted = root >= tl.load(prefill_len_ptr + state, mask=is_request, other=0)
        length = tl.load(lengths_ptr + request, mask=is_request, other=0)
        accepted += (is_request & is_drafted & (length > depth)).to(tl.float32)
    tl.store(expected_ptr + depth, tl.load(expected_ptr + depth) * decay + tl.sum(expected, axis=0))
    tl.store(accepted_ptr + depth, tl.load(accepted_ptr + depth) * decay + tl.sum(accepted, axis=0))
