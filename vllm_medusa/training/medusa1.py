# SPDX-License-Identifier: Apache-2.0
"""Medusa-1: the heads are trained, the target is frozen (paper, section 2.2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.accuracy import HeldOut, score_heads
from vllm_medusa.training.config import HeadsLoss, Medusa1Config, Recipe
from vllm_medusa.training.draft_vocabulary import DraftVocabulary
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.hidden import embedding_of, final_hidden_states, lm_head_of
from vllm_medusa.training.losses import LabelCounts, medusa_loss
from vllm_medusa.training.target_logits import TargetLogits
from vllm_medusa.training.teacher import Teacher, TopTokens
from vllm_medusa.training.trainer import MedusaTrainer, training_arguments


def untrained_heads(
    target: PreTrainedModel, recipe: Recipe, vocabulary: DraftVocabulary | None = None
) -> TrainableHeads:
    """Return untrained heads in fp32 on the target's device; without ``vocabulary`` they can draft all tokens.

    Raises:
        ValueError: the target has no usable LM head, or the heads cannot share it because it has a bias.

    """
    lm_head = lm_head_of(target)
    if recipe.shared_lm_head and getattr(lm_head, "bias", None) is not None:
        raise ValueError(
            f"shared_lm_head must be false for {type(target).__name__}, got true: its LM head has a bias, which the "
            "checkpoint of the heads cannot hold"
        )
    spec = HeadsSpec(
        hidden_size=lm_head.weight.shape[1],
        vocab_size=lm_head.weight.shape[0],
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        shared_lm_head=recipe.shared_lm_head,
        draft_vocab_size=None if vocabulary is None else len(vocabulary.tokens),
        path_rank=recipe.path_rank,
    )
    embedding = None if spec.path_rank is None else embedding_of(target)
    token_map = None if vocabulary is None else vocabulary.tokens.to(lm_head.weight.device)
    return TrainableHeads(spec, lm_head.weight, token_map, embedding).to(lm_head.weight.device)


class Medusa1(nn.Module):
    """A frozen target and its heads.

    Args:
        target: the target.
        recipe: the settings.
        vocabulary: the tokens that the heads can draft; None for all.
        learns: the heads learn from labels, or from the target's own distribution.

    Raises:
        ValueError: no heads can be trained on the target.

    """

    target: PreTrainedModel | None

    def __init__(
        self,
        target: PreTrainedModel,
        recipe: Recipe,
        vocabulary: DraftVocabulary | None = None,
        learns: HeadsLoss = "cross_entropy",
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.target = target.requires_grad_(False)
        self.heads = untrained_heads(target, recipe, vocabulary)
        self.teacher = Teacher(TargetLogits(target), recipe.chunk_size) if learns == "kl" else None
        self._no_split_modules = target._no_split_modules  # accelerate's FSDP wraps these modules.

    def train(self, mode: bool = True) -> Medusa1:
        """Switch only the heads to training mode."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def release_target(self) -> None:
        """Give up the target, whose memory can be freed; from then on ``forward`` must be given its outputs."""
        self.target = self.teacher = None
        self._no_split_modules = []

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, length], int64
        labels: torch.Tensor,  # [batch, length], int64
        counts: LabelCounts | None = None,
        hidden: torch.Tensor | None = None,  # [batch, length, hidden_size]
        top_tokens: torch.Tensor | None = None,  # [batch, length, tokens], int32
        top_log_probs: torch.Tensor | None = None,  # [batch, length, tokens], float16
    ) -> dict[str, torch.Tensor]:
        """Return the batch's share of the step's loss; in evaluation mode see ``evaluate_batch``.

        ``hidden`` and ``TopTokens`` are the target's outputs; what is not given is computed.
        """
        if hidden is None:
            assert self.target is not None
            with torch.no_grad():
                hidden = final_hidden_states(self.target, input_ids)
        recipe = self.recipe
        if not self.training:
            return evaluate_batch(self.heads, hidden.float(), input_ids, labels, recipe)
        teacher = None if self.teacher is None else self.teacher(hidden)
        if top_tokens is not None and top_log_probs is not None:
            teacher = TopTokens(top_tokens, top_log_probs)
        loss = medusa_loss(
            self.heads, hidden.float(), labels, recipe.decay, recipe.chunk_size, counts, teacher, input_ids
        )
        return {"loss": loss}


def evaluate_batch(
    heads: TrainableHeads,
    hidden: torch.Tensor,  # [batch, length, hidden_size]
    input_ids: torch.Tensor,  # [batch, length], int64
    labels: torch.Tensor,  # [batch, length], int64
    recipe: Recipe,
) -> dict[str, torch.Tensor]:
    """Return the heads' loss, and the scores of each block in the order of ``HeldOut.of``'s arguments."""
    scores = score_heads(heads, hidden, labels, recipe.ranks, input_ids)
    weights = recipe.decay ** torch.arange(1, heads.spec.num_heads + 1, device=hidden.device)
    loss = (weights * scores.losses.sum(dim=0) / scores.drafted.sum(dim=0).clamp(min=1)).sum()
    return {"loss": loss, **vars(scores)}


@dataclass(frozen=True, eq=False)
class Medusa1Result:
    """The trained heads, on the target's device, and their metrics on the held-out blocks."""

    heads: TrainableHeads
    held_out: HeldOut

    @property
    def accuracies(self) -> torch.Tensor:
        """``HeldOut.accuracies`` as ``[heads, ranks]``, float32."""
        return torch.tensor(self.held_out.accuracies)


def train_medusa1(
    target: PreTrainedModel,
    blocks: torch.Tensor,
    held_out: torch.Tensor,
    config: Medusa1Config,
    show_progress: bool = True,
) -> Medusa1Result:
    """Train heads in memory; nothing is written.

    Args:
        target: a causal language model of ``transformers``; it is frozen and moved to the training device.
        blocks: ``[blocks, length]``, int64: the token ids to train on.
        held_out: ``[blocks, length]``, int64: the token ids to evaluate on.
        config: the settings.
        show_progress: whether to show progress.

    Raises:
        ValueError: no heads can be trained on the target.

    """
    model = Medusa1(target, config)
    with TemporaryDirectory() as directory:
        trainer = MedusaTrainer(
            model,
            config,
            training_arguments(config, Path(directory), max_steps=config.steps),
            labelled(blocks, config.prompt_length),
            labelled(held_out, config.prompt_length),
            show_progress,
        )
        return Medusa1Result(model.heads, trainer.fit())


def labelled(blocks: torch.Tensor, prompt_length: int) -> list[dict[str, torch.Tensor]]:
    """Label all tokens of ``[blocks, length]`` but the first ``prompt_length`` of each block."""
    labels = blocks.clone()
    labels[:, :prompt_length] = IGNORED
    return [{"input_ids": ids, "labels": row} for ids, row in zip(blocks, labels, strict=True)]
