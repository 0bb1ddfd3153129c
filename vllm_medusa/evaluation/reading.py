# SPDX-License-Identifier: Apache-2.0
"""One pass over held-out texts: what is right of what heads say, how likely, and some states to draft from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.evaluation.lookup import Matches
from vllm_medusa.evaluation.reliability import Positions
from vllm_medusa.evaluation.served import ServedHeads
from vllm_medusa.evaluation.temperatures import GRID, losses_by_temperature
from vllm_medusa.progress import progress
from vllm_medusa.training.hidden import final_hidden_states
from vllm_medusa.training.losses import head_pairs
from vllm_medusa.training.paths import path_tokens
from vllm_medusa.tree.lookup import LOOKBACK, last_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATES = 4096
"""Positions whose hidden states are kept, chosen at random: where steps begin there, trees are drafted to judge their
scores."""


@dataclass(frozen=True, eq=False)
class ReadText:
    """What heads say along a text.

    Attributes:
        ranks: ``[length, heads]``, int64: at which rank each head is right: the number of ranks where at none,
            ``IGNORED`` where no label is.
        losses: ``[length, heads, temperatures]``, float32: infinite where no label is that can be drafted.
        followed: ``[length, heads]``, bool: whether the label is what followed the path's longest match in the text.
        matched: ``[length, heads]``, int64: the length of that match.
        kept: ``[length]``, bool: of which positions ``at`` holds the hidden states.
        at: those.

    """

    ranks: torch.Tensor
    losses: torch.Tensor
    followed: torch.Tensor
    matched: torch.Tensor
    kept: torch.Tensor
    at: Positions


StatesOf = Callable[[torch.Tensor], torch.Tensor]
"""Gives the target's hidden states after its final norm, ``[batch, length, hidden_size]``, of token ids."""


def states_of_target(
    target: PreTrainedModel,
    tokens: torch.Tensor,  # [batch, length], int64
) -> torch.Tensor:
    """Let the target read (see ``StatesOf``)."""
    return final_hidden_states(target, tokens.to(target.device))


class Remembered:
    """A target that reads each batch of texts once, for all who ask for its states (see ``StatesOf``)."""

    def __init__(self, target: PreTrainedModel) -> None:
        self._target = target
        self._states: dict[bytes, torch.Tensor] = {}

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        name = tokens.numpy().tobytes()
        if name not in self._states:
            self._states[name] = states_of_target(self._target, tokens)
        return self._states[name]


def read_texts(
    states_of: StatesOf,
    served: ServedHeads,
    samples: Sequence[Sample],
    ranks: int,
    batch_size: int,
    show_progress: bool,
) -> list[ReadText]:
    """Let the target and its heads read texts; none attends to another.

    Args:
        states_of: what the target makes of texts.
        served: its heads.
        samples: texts, with labels on the tokens that the target wrote.
        ranks: how many of each head's most probable tokens are counted.
        batch_size: texts per batch.
        show_progress: whether to show progress.

    """
    num_heads, texts = served.heads.spec.num_heads, []
    batches = list(_batches(samples, batch_size))
    candidates = _candidates([_complete(labels, num_heads) for _, labels in batches])
    with progress("Heads' accuracy, batches", len(batches), show_progress) as shown:
        for (tokens, labels), of_batch in zip(batches, candidates, strict=True):
            states = states_of(tokens)
            tokens, labels = tokens.to(states.device), labels.to(states.device)
            for hidden, text, of_text, kept in zip(states, tokens, labels, of_batch, strict=True):
                said = _said(served, hidden, text, of_text, ranks)
                texts.append(ReadText(*said, kept, _positions(hidden, text, kept.to(hidden.device), num_heads)))
            shown.advance(tokens=tokens.numel())
    return texts


def _said(
    served: ServedHeads,
    hidden: torch.Tensor,  # [length, hidden_size]
    tokens: torch.Tensor,  # [length], int64
    labels: torch.Tensor,  # [length], int64
    ranks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a text's ranks and losses, whether labels followed matches, and the matches' lengths, on the CPU.

    Only one head's logits are in memory at a time.
    """
    shape = len(tokens), served.heads.spec.num_heads
    found = torch.full(shape, IGNORED, device=hidden.device)
    losses = torch.full((*shape, len(GRID)), torch.inf, device=hidden.device)
    followed = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
    matches = Matches.of(tokens, shape[1])
    for head in range(min(shape[1], shape[0] - 2)):
        states, expected = head_pairs(head, hidden[None], labels[None])
        at = (expected != IGNORED).nonzero()[:, 0]
        expected = expected[at]
        logits = served.logits(head, states[at], path_tokens(head, tokens[None])[at])
        best = served.best_tokens(head, logits, ranks, matches.tokens[at, head], matches.lengths[at, head])
        right = best == expected[:, None]
        found[at, head] = torch.where(right.any(dim=1), right.long().argmax(dim=1), ranks)
        followed[at, head] = matches.tokens[at, head] == expected
        rows = served.heads.rows_of(expected)
        known = rows != IGNORED
        losses[at[known], head] = losses_by_temperature(logits[known], rows[known])
    return found.cpu(), losses.cpu(), followed.cpu(), matches.lengths.cpu()


def _complete(
    labels: torch.Tensor,  # [batch, length], int64
    num_heads: int,
) -> torch.Tensor:
    """Return ``[batch, length]``, bool: after which positions every head has a label."""
    complete = torch.ones_like(labels, dtype=torch.bool)
    for ahead in range(2, num_heads + 2):
        complete &= functional.pad(labels != IGNORED, (0, ahead))[:, ahead:]
    return complete


def _candidates(complete: list[torch.Tensor]) -> list[torch.Tensor]:
    """Keep ``CANDIDATES`` of the true elements, the same ones every time."""
    places = torch.cat([each.flatten() for each in complete])
    of_places = places.nonzero()[:, 0]
    kept = torch.randperm(len(of_places), generator=torch.Generator().manual_seed(0))[:CANDIDATES]
    chosen = torch.zeros_like(places)
    chosen[of_places[kept]] = True
    parts = chosen.split([each.numel() for each in complete])
    return [part.view(each.shape) for part, each in zip(parts, complete, strict=True)]


def _positions(
    hidden: torch.Tensor,  # [length, hidden_size]
    tokens: torch.Tensor,  # [length], int64
    chosen: torch.Tensor,  # [length], bool
    num_heads: int,
) -> Positions:
    """Return the chosen positions of a text."""
    at = chosen.nonzero()[:, 0]
    ahead = torch.arange(2, num_heads + 2, device=at.device)
    rows = tokens.int().expand(len(at), -1)
    text = last_tokens(rows, torch.arange(len(at), device=at.device), at + 2, LOOKBACK)
    return Positions(hidden[at], tokens[at + 1], tokens[at[:, None] + ahead], text)


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and labels, ``[batch, length]``, int64, of texts of similar length.

    Padding is at the end of a row: no token attends to it, and it has no labels.
    """
    by_length = sorted(samples, key=len)
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        tokens = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        for row, sample in enumerate(batch):
            tokens[row, : len(sample)] = torch.tensor(sample.input_ids)
            labels[row, : len(sample)] = torch.tensor(sample.labels)
        yield tokens, labels
