# SPDX-License-Identifier: Apache-2.0
"""Measure heads on the target's own text: accuracies, from which trees are grown (paper, section 2.3.3), temperatures,
and whether scores are what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from vllm_medusa.checkpoint.format import HeadsSpec, read_spec, read_state
from vllm_medusa.checkpoint.target import check_sizes
from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.evaluation.paths import count_paths
from vllm_medusa.evaluation.reliability import DraftReliability, Positions, draft_reliability
from vllm_medusa.evaluation.served import ServedHeads
from vllm_medusa.evaluation.temperatures import GRID, best_temperature
from vllm_medusa.evaluation.temperatures import losses as temperature_losses
from vllm_medusa.progress import progress
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.hidden import embedding_of, final_hidden_states, lm_head_of
from vllm_medusa.training.losses import head_pairs
from vllm_medusa.training.paths import path_tokens
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.best_first import JointPaths, available_nodes
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.options import DYNAMIC_BEAM, DYNAMIC_TOP_K

if TYPE_CHECKING:
    from transformers import PreTrainedModel


JUDGED_NODES = 31
"""Nodes of the dynamic trees whose scores are judged: as many as on a GPU by default."""

MOST_POSITIONS = 2048
"""Positions at which trees are drafted to judge their scores, chosen at random; each of them counts for many nodes."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured.

    Attributes:
        accuracies: ``[heads][ranks]``: the share of positions whose label is the head's token of exactly that rank.
        positions: ``[heads]``: the number of positions that have a label.
        paths: how often paths are right as a whole, where labels follow for all heads.
        temperatures: ``[heads]``: those that fit best.
        before: dynamic trees at temperature 1.
        after: dynamic trees at ``temperatures``.

    """

    accuracies: list[list[float]]
    positions: list[int]
    paths: JointPaths
    temperatures: list[float]
    before: DraftReliability
    after: DraftReliability

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
    logit_scale: float = 1.0,
) -> Evaluation:
    """Measure heads on texts; no text attends to another.

    Args:
        target: a causal language model of ``transformers``.
        heads: its heads.
        samples: texts, with labels on the tokens that the target wrote.
        ranks: how many of each head's most probable tokens are counted.
        batch_size: texts per batch.
        show_progress: whether to show progress.
        logit_scale: the entry of the heads' ``config.json``.

    Raises:
        ValueError: all texts are too short for a head, or the target does to its logits what is not known.

    """
    num_heads = heads.spec.num_heads
    served = ServedHeads.of(target, heads, logit_scale)
    losses = torch.zeros(num_heads, len(GRID), dtype=torch.float64)
    batches = list(_batches(samples, batch_size))
    chosen = _choose([_complete(labels, num_heads) for _, labels in batches])
    found, positions = [], []
    with progress("Heads' accuracy, batches", len(batches), show_progress) as shown:
        for (tokens, labels), at in zip(batches, chosen, strict=True):
            tokens, labels, at = (each.to(target.device) for each in (tokens, labels, at))
            hidden = final_hidden_states(target, tokens)
            for block in range(len(tokens)):
                text = tokens[block], labels[block]
                found.append(_right_ranks(served, hidden[block], *text, ranks, losses).cpu())
                positions.append(_positions(hidden[block], tokens[block], at[block], num_heads))
            shown.advance(tokens=tokens.numel())
    of_all = torch.cat(found)
    labelled = (of_all != IGNORED).sum(dim=0)
    if not labelled.all():
        head = int((labelled == 0).nonzero()[0]) + 1
        raise ValueError(
            f"head {head} has nothing to predict in {len(samples)} texts: it predicts {head + 1} tokens ahead; "
            "give longer texts"
        )
    complete = of_all[(of_all != IGNORED).all(dim=1)]
    if not len(complete):
        raise ValueError(
            f"no {num_heads} tokens in a row were written by the target in {len(samples)} texts; give longer texts"
        )
    hits = torch.stack([(of_all == rank).sum(dim=0) for rank in range(ranks)], dim=1)
    temperatures = [best_temperature(of_grid) for of_grid in losses]
    sampled = Positions(*(torch.cat(each) for each in zip(*positions, strict=True)))
    tree = _dynamic_tree(heads.spec)
    return Evaluation(
        accuracies=(hits / labelled[:, None]).tolist(),
        positions=labelled.tolist(),
        paths=count_paths(complete, ranks),
        temperatures=temperatures,
        before=draft_reliability(served, tree, sampled),
        after=draft_reliability(served.at(temperatures), tree, sampled),
    )


def _right_ranks(
    served: ServedHeads,
    hidden: torch.Tensor,  # [length, hidden_size]
    tokens: torch.Tensor,  # [length], int64
    labels: torch.Tensor,  # [length], int64
    ranks: int,
    losses: torch.Tensor,  # [heads, temperatures], float64
) -> torch.Tensor:
    """Return the rank at which each head is right, and add to the losses at each temperature.

    Only one head's logits are in memory at a time. A label that the heads cannot draft is one that they miss.

    Returns:
        ``[length, heads]``, int64: ``ranks`` where a head is right at none, ``IGNORED`` where no label is.

    """
    num_heads = losses.shape[0]
    rows = served.heads.rows_of(labels)
    found = torch.full((len(tokens), num_heads), IGNORED, device=hidden.device)
    for head in range(min(num_heads, len(tokens) - 2)):
        states, expected = head_pairs(head, hidden[None], rows[None])
        of_head = torch.where(labels[head + 2 :] == IGNORED, IGNORED, ranks)
        known = expected != IGNORED
        path = path_tokens(head, tokens[None])[known]
        logits, expected = served.logits(head, states[known], path), expected[known]
        losses[head] += temperature_losses(logits, expected)
        best = logits.topk(min(ranks, logits.shape[-1]), dim=-1).indices == expected[:, None]
        of_head[known] = torch.where(best.any(dim=1), best.long().argmax(dim=1), ranks)
        found[: len(of_head), head] = of_head
    return found


def _complete(
    labels: torch.Tensor,  # [batch, length], int64
    num_heads: int,
) -> torch.Tensor:
    """Return ``[batch, length]``, bool: after which positions every head has a label."""
    complete = torch.ones_like(labels, dtype=torch.bool)
    for ahead in range(2, num_heads + 2):
        complete &= functional.pad(labels != IGNORED, (0, ahead))[:, ahead:]
    return complete


def _choose(complete: list[torch.Tensor]) -> list[torch.Tensor]:
    """Keep ``MOST_POSITIONS`` of the true elements, the same ones every time."""
    places = torch.cat([each.flatten() for each in complete])
    of_places = places.nonzero()[:, 0]
    kept = torch.randperm(len(of_places), generator=torch.Generator().manual_seed(0))[:MOST_POSITIONS]
    chosen = torch.zeros_like(places)
    chosen[of_places[kept]] = True
    parts = chosen.split([each.numel() for each in complete])
    return [part.view(each.shape) for part, each in zip(parts, complete, strict=True)]


def _positions(
    hidden: torch.Tensor,  # [length, hidden_size]
    tokens: torch.Tensor,  # [length], int64
    chosen: torch.Tensor,  # [length], bool
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what ``Positions`` holds of a text."""
    at = chosen.nonzero()[:, 0]
    ahead = torch.arange(2, num_heads + 2, device=at.device)
    return hidden[at], tokens[at + 1], tokens[at[:, None] + ahead]


def _dynamic_tree(spec: HeadsSpec) -> DynamicTree | BeamTree:
    """Return the tree that a GPU verifies by default, or a smaller one for few heads."""
    top_k = min(DYNAMIC_TOP_K, spec.lm_head_rows)
    nodes = min(JUDGED_NODES, available_nodes(spec.num_heads, top_k))
    if spec.path_rank is not None:
        return BeamTree(spec.num_heads, nodes, top_k, DYNAMIC_BEAM, 0.0)
    return DynamicTree(spec.num_heads, nodes, top_k, 0.0)


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
