# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a batch's drafts are verified.

Along a draft probabilities fall, and every prefix of a tree is a tree. So the m most probable nodes of all drafts are a
prefix of each, and choosing them is cutting each request's draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Choice:
    """How much of each draft is verified.

    Attributes:
        lengths: ``[num_reqs]``, int64: nodes of each request.
        tokens_per_second: what the step is expected to emit, by what it is expected to take.

    """

    lengths: torch.Tensor
    tokens_per_second: float


def choose(
    probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32, falling along each request
    lengths: torch.Tensor,  # [num_reqs], int64
    num_reqs: int,
    seconds: torch.Tensor,  # [most nodes + 1], float64
) -> Choice:
    """Choose the most probable nodes, as many as give the most tokens in a second.

    A request emits a token for each node that is accepted, and one more. So a step that verifies m nodes is expected to
    emit ``num_reqs`` tokens and the sum of the nodes' probabilities.

    Args:
        probabilities: how probable it is that each node is accepted; of no meaning past a draft's length.
        lengths: nodes of each draft.
        num_reqs: requests that emit a token in the step.
        seconds: what the step takes with 0, 1, 2, ... nodes; never falling. No more nodes than that are verified.

    """
    values, indices = _rank(probabilities, lengths, len(seconds) - 1)
    tokens = torch.cat([torch.zeros(1), values.cumsum(0)]).double() + num_reqs
    rates = tokens / seconds[: len(tokens)]
    best = int(rates.argmax())
    return Choice(_count(indices[:best], probabilities), float(rates[best]))


def most_probable(
    probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32, falling along each request
    lengths: torch.Tensor,  # [num_reqs], int64
    most: int,
) -> torch.Tensor:  # [num_reqs], int64
    """Return how many nodes each request has among the ``most`` most probable ones of all drafts (see ``choose``)."""
    _, indices = _rank(probabilities, lengths, most)
    return _count(indices, probabilities)


def _rank(probabilities: torch.Tensor, lengths: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable nodes' probabilities, falling, and places in ``probabilities.flatten()``."""
    node = torch.arange(probabilities.shape[1])
    flat = probabilities.masked_fill(node >= lengths[:, None], -1).flatten()
    # A stable sort keeps a request's nodes in order where they are as probable.
    ranked = flat.sort(descending=True, stable=True)
    count = min(int(lengths.sum()), most)
    return ranked.values[:count], ranked.indices[:count]


def _count(chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Count the chosen places of ``probabilities.flatten()`` in each of its rows."""
    num_reqs, num_nodes = probabilities.shape
    return torch.bincount(chosen // num_nodes, minlength=num_reqs)
