# SPDX-License-Identifier: Apache-2.0
"""Measure heads on the target's own text: accuracies, from which trees are grown (paper, section 2.3.3), temperatures,
and whether scores are what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_medusa.checkpoint.format import HeadsSpec, read_spec, read_state
from vllm_medusa.checkpoint.target import check_sizes
from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.evaluation.lookup import best_weights
from vllm_medusa.evaluation.paths import count_paths
from vllm_medusa.evaluation.reading import ReadText, Remembered, StatesOf, read_texts
from vllm_medusa.evaluation.reliability import DraftReliability, Positions, draft_reliability
from vllm_medusa.evaluation.served import ServedHeads
from vllm_medusa.evaluation.temperatures import GRID, best_temperature
from vllm_medusa.evaluation.walk import visited
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.hidden import embedding_of, lm_head_of
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.best_first import JointPaths, available_nodes, best_first
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.options import DYNAMIC_TOP_K, TreeOptions
from vllm_medusa.tree.static import chain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


JUDGED_NODES = 31
"""Nodes of the dynamic trees whose scores are judged: as many as on a GPU by default."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured.

    Attributes:
        accuracies: ``[heads][ranks]``: the share of positions whose label is the head's token of exactly that rank.
        positions: ``[heads]``: the number of positions that have a label.
        steps: the number of positions where steps begin (see ``walk``); all that follows is of these.
        paths: how often paths are right as a whole.
        temperatures: ``[heads]``: those that fit best.
        lookup_weights: ``[heads][match lengths]``: those that fit best; None for heads alone.
        before: dynamic trees at temperature 1, without lookup.
        after: dynamic trees at ``temperatures``, with lookup.

    """

    accuracies: list[list[float]]
    positions: list[int]
    steps: int
    paths: JointPaths
    temperatures: list[float]
    lookup_weights: list[list[float]] | None
    before: DraftReliability
    after: DraftReliability

    @property
    def top_k(self) -> list[list[float]]:
        """``[heads][ranks]``: the share of positions whose label is among the head's top 1, 2, ... tokens."""
        return torch.tensor(self.accuracies, dtype=torch.float64).cumsum(dim=1).tolist()


def load_heads(
    directory: Path, target_directory: Path, target: PreTrainedModel, *, trust_remote_code: bool = False
) -> TrainableHeads:
    """Load heads in the layout that vLLM serves, in the dtype and on the device of the target's LM head.

    Args:
        directory: the heads' directory.
        target_directory: the target's.
        target: the target.
        trust_remote_code: whether code in the target's directory may run.

    Raises:
        ValueError: the heads do not fit the target, or their layout is another.
        OSError: a file is missing.

    """
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory} of heads; give the one that training or convert wrote")
    spec = read_spec(directory)
    check_sizes(spec, target_directory, trust_remote_code=trust_remote_code)
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
    states_of: StatesOf | None = None,
    *,
    lookup: bool = True,
) -> Evaluation:
    """Measure heads on texts; no text attends to another.

    With lookup heads read the texts three times: for temperatures and first weights, which are of steps of heads alone;
    for weights where steps begin that pass over what is easily copied; and for what is drafted then.

    Args:
        target: a causal language model of ``transformers``.
        heads: its heads.
        samples: texts, with labels on the tokens that the target wrote.
        ranks: how many of each head's most probable tokens are counted.
        batch_size: texts per batch.
        show_progress: whether to show progress.
        logit_scale: the entry of the heads' ``config.json``.
        states_of: what the target makes of texts, where several heads are measured on the same; None: found anew.
        lookup: whether what followed a path earlier in the text is drafted too.

    Raises:
        ValueError: all texts are too short for a head, or the target does to its logits what is not known.

    """
    states_of = states_of or Remembered(target)
    plain = ServedHeads.of(target, heads, logit_scale)

    def read(served: ServedHeads) -> list[tuple[ReadText, torch.Tensor]]:
        """Return the texts, and at which of their positions steps begin."""
        texts = read_texts(states_of, served, samples, ranks, batch_size, show_progress)
        _check_labels(texts)
        return list(zip(texts, where_steps_begin(texts, ranks), strict=True))

    steps = read(plain)
    losses = torch.cat([text.losses[begins] for text, begins in steps])
    temperatures = [best_temperature(losses[:, head]) for head in range(heads.spec.num_heads)]
    lookup_weights = None
    if lookup:
        steps = read(plain.at(temperatures, _fitted_weights(steps, temperatures)))
        lookup_weights = _fitted_weights(steps, [1.0] * heads.spec.num_heads)
        steps = read(plain.at(temperatures, lookup_weights))
    served, sequential = plain.at(temperatures, lookup_weights), heads.spec.path_rank is not None
    judged = Positions.cat([text.at.where(begins[text.kept]) for text, begins in steps])
    found = torch.cat([text.ranks for text, _ in steps])
    labelled = (found != IGNORED).sum(dim=0)
    hits = torch.stack([(found == rank).sum(dim=0) for rank in range(ranks)], dim=1)
    return Evaluation(
        accuracies=(hits / labelled[:, None]).tolist(),
        positions=labelled.tolist(),
        steps=int(sum(begins.sum() for _, begins in steps)),
        paths=count_paths(torch.cat([text.ranks[begins] for text, begins in steps]), ranks),
        temperatures=temperatures,
        lookup_weights=lookup_weights,
        before=draft_reliability(plain, _dynamic_tree(heads.spec, by_level=sequential), judged),
        after=draft_reliability(served, _dynamic_tree(heads.spec, by_level=sequential or lookup), judged),
    )


def _fitted_weights(steps: Sequence[tuple[ReadText, torch.Tensor]], temperatures: Sequence[float]) -> list[list[float]]:
    """Fit each head's weights at the positions where steps begin.

    Args:
        steps: the texts, and at which of their positions steps begin.
        temperatures: by which the heads' logits are to be divided yet, for each head the nearest of the grid.

    """
    losses, followed, matched = (
        torch.cat([getattr(text, name)[begins] for text, begins in steps]) for name in ("losses", "followed", "matched")
    )
    nearest = [int((GRID.log() - math.log(each)).abs().argmin()) for each in temperatures]
    return [
        best_weights(torch.exp(-losses[:, head, at]), followed[:, head], matched[:, head])
        for head, at in enumerate(nearest)
    ]


def _check_labels(texts: Sequence[ReadText]) -> None:
    """Raise ``ValueError`` if a head has nothing to predict, or all heads together have not."""
    found = torch.cat([text.ranks for text in texts])
    labelled = (found != IGNORED).sum(dim=0)
    if not labelled.all():
        head = int((labelled == 0).nonzero()[0]) + 1
        raise ValueError(
            f"head {head} has nothing to predict in {len(texts)} texts: it predicts {head + 1} tokens ahead; "
            "give longer texts"
        )
    if not (found != IGNORED).all(dim=1).any():
        raise ValueError(
            f"no {found.shape[1]} tokens in a row were written by the target in {len(texts)} texts; give longer texts"
        )


def where_steps_begin(texts: Sequence[ReadText], ranks: int) -> list[torch.Tensor]:
    """Decode the texts with the best tree of ``JUDGED_NODES`` nodes; return what ``visited`` does of each text."""
    found = torch.cat([text.ranks for text in texts])
    everywhere = count_paths(found[(found != IGNORED).all(dim=1)], ranks)
    reference = best_first(everywhere, min(JUDGED_NODES, everywhere.available)) if everywhere.available else chain(1)
    return [visited(text.ranks, reference) for text in texts]


def _dynamic_tree(spec: HeadsSpec, *, by_level: bool) -> DynamicTree | BeamTree:
    """Return the tree that a GPU verifies by default, or a smaller one for few heads."""
    top_k = min(DYNAMIC_TOP_K, spec.lm_head_rows)
    options = TreeOptions(
        num_heads=spec.num_heads,
        vocab_size=spec.lm_head_rows,
        accuracies=None,
        num_nodes=min(JUDGED_NODES, available_nodes(spec.num_heads, top_k)),
        default_num_nodes=JUDGED_NODES,
        top_k=top_k,
        min_probability=None,
        by_level=by_level,
    )
    return options.dynamic()
