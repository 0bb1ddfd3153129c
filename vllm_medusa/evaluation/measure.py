# SPDX-License-Identifier: Apache-2.0
"""Measure the heads' accuracies on the target's own text; trees are grown from them (paper, section 2.3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_medusa.checkpoint.format import read_spec, read_state
from vllm_medusa.checkpoint.target import check_sizes
from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.progress import progress
from vllm_medusa.training.accuracy import score_heads
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.hidden import embedding_of, final_hidden_states, lm_head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """The measured accuracies.

    Attributes:
        accuracies: ``[heads][ranks]``: the share of positions whose label is the head's token of exactly that rank.
        positions: ``[heads]``: the number of positions that have a label.

    """

    accuracies: list[list[float]]
    positions: list[int]

    @property
    def top_k(self) -> list[list[float]]:
        """``[heads][ranks]``: the share of positions whose label is among the head's top 1, 2, ... tokens."""
        return torch.tensor(self.accuracies, dtype=torch.float64).cumsum(dim=1).tolist()


def load_heads(directory: Path, target_directory: Path, target: PreTrainedModel) -> TrainableHeads:
    """Load heads in the layout that vLLM serves, in the dtype and on the device of the target's LM head.

    Raises:
        ValueError: the heads do not fit the target, or their layout is another.
        OSError: a file is missing.

    """
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory} of heads; give the one that training or convert wrote")
    spec = read_spec(directory)
    check_sizes(spec, target_directory)
    with torch.device("meta"):
        token_map = None if spec.draft_vocab_size is None else torch.empty(spec.draft_vocab_size, dtype=torch.int64)
        heads = TrainableHeads(spec, torch.empty(spec.vocab_size, spec.hidden_size), token_map)
    heads.load_state_dict(read_state(directory), assign=True)
    if spec.path_rank is not None:
        heads.embedding = embedding_of(target)
    weight = lm_head_of(target).get_parameter("weight")
    return heads.to(weight.device, weight.dtype)


@torch.no_grad()
def evaluate_heads(
    target: PreTrainedModel,
    heads: TrainableHeads,
    samples: Sequence[Sample],
    ranks: int = 10,
    batch_size: int = 8,
    show_progress: bool = True,
) -> Evaluation:
    """Measure heads on texts; no text attends to another.

    Args:
        target: a causal language model of ``transformers``.
        heads: its heads.
        samples: texts, with labels on the tokens that the target wrote.
        ranks: how many of each head's most probable tokens are counted.
        batch_size: texts per batch.
        show_progress: whether to show progress.

    Raises:
        ValueError: all texts are too short for a head.

    """
    hits = torch.zeros(heads.spec.num_heads, ranks, dtype=torch.int64)
    positions = torch.zeros(heads.spec.num_heads, dtype=torch.int64)
    batches = list(_batches(samples, batch_size))
    with progress("Heads' accuracy, batches", len(batches), show_progress) as shown:
        for tokens, labels in batches:
            hidden = final_hidden_states(target, tokens.to(target.device))
            scores = score_heads(heads, hidden, labels.to(hidden.device), ranks, tokens.to(hidden.device))
            hits += scores.hits.sum(dim=0).cpu()
            positions += scores.positions.sum(dim=0).cpu()
            shown.advance(tokens=tokens.numel())
    if not positions.all():
        head = int((positions == 0).nonzero()[0]) + 1
        raise ValueError(
            f"head {head} has nothing to predict in {len(samples)} texts: it predicts {head + 1} tokens ahead; "
            "give longer texts"
        )
    return Evaluation((hits / positions[:, None]).tolist(), positions.tolist())


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
