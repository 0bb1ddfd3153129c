# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a batch's drafts are verified.

Along a draft probabilities fall, and every prefix of a tree is a tree. So the m most probable nodes of all drafts are a
prefix of each, and choosing them is cutting each request's draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Choice:
    """How much of each draft is verified.

    Attributes:
        lengths: ``[num_reqs]``, int64: nodes of each request.
        tokens: what the step is expected to emit.
        seconds: what it is expected to take.
        left: the probability of the most probable node that is not verified; 0 if all are.

    """

    lengths: torch.Tensor
    tokens: float
    seconds: float
    left: float


def choose(
    probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32, falling along each request
    lengths: torch.Tensor,  # [num_reqs], int64
    num_reqs: int,
    seconds: torch.Tensor,  # [most nodes + 1], float64
    rate: float,
) -> Choice:
    """Choose the most probable nodes, as many as give the most tokens in a second over many steps.

    A request emits a token for each node that is accepted, and one more. So a step that verifies m nodes is expected to
    emit ``num_reqs`` tokens and the sum of the nodes' probabilities. It delays the steps behind it, which would emit
    ``rate`` tokens in each second. So m is the number with the most tokens beyond these. Where ``rate`` is the average
    of steps that are chosen so, no other choice has a higher one (Dinkelbach, Management Science 13(7), 1967): where
    heads are sure a step verifies more than is best for that step alone, where they are unsure less.

    Args:
        probabilities: how probable it is that each node is accepted; of no meaning past a draft's length.
        lengths: nodes of each draft.
        num_reqs: requests that emit a token in the step.
        seconds: what the step takes with 0, 1, 2, ... nodes; never falling. No more nodes than that are verified.
        rate: tokens in a second that such steps emit on average.

    """
    ranked = _rank(probabilities, lengths, len(seconds) - 1)
    falling = probabilities.numpy().ravel()[ranked]
    tokens = np.full(len(ranked) + 1, num_reqs, dtype=np.float64)
    tokens[1:] += np.cumsum(falling, dtype=np.float64)
    taken = seconds.numpy()[: len(tokens)]
    best = int((tokens - rate * taken).argmax())
    left = float(falling[best]) if best < len(falling) else 0.0
    return Choice(_count(ranked[:best], probabilities), float(tokens[best]), float(taken[best]), left)


def count_most_probable(
    probabilities: torch.Tensor,  # [num_reqs, num_nodes], float32, falling along each request
    lengths: torch.Tensor,  # [num_reqs], int64
    most: int,
) -> torch.Tensor:  # [num_reqs], int64
    """Return how many nodes each request has among the ``most`` most probable ones of all drafts (see ``choose``)."""
    return _count(_rank(probabilities, lengths, most), probabilities)


def _rank(probabilities: torch.Tensor, lengths: torch.Tensor, most: int) -> np.ndarray:
    """Return the places of the most probable nodes in ``probabilities.flatten()``, most probable first."""
    # NumPy, on the tensors' own memory: on so few numbers its operations cost a third of PyTorch's.
    is_node = np.arange(probabilities.shape[1]) < lengths.numpy()[:, None]
    # A stable sort keeps a request's nodes in order where they are as probable.
    ranked = np.where(is_node, -probabilities.numpy(), 1).ravel().argsort(kind="stable")
    return ranked[: min(int(is_node.sum()), most)]


def _count(chosen: np.ndarray, probabilities: torch.Tensor) -> torch.Tensor:
    """Count the chosen places of ``probabilities.flatten()`` in each of its rows."""
    num_reqs, num_nodes = probabilities.shape
    return torch.from_numpy(np.bincount(chosen // num_nodes, minlength=num_reqs))
