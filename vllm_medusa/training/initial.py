# SPDX-License-Identifier: Apache-2.0
"""Heads that were trained before, with which a run begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vllm_medusa.checkpoint.format import TOKEN_MAP, HeadsSpec, read_spec, read_state
from vllm_medusa.training.draft_vocabulary import DraftVocabulary
from vllm_medusa.training.heads import TrainableHeads


@dataclass(frozen=True, eq=False)
class InitialHeads:
    """A checkpoint of heads.

    Attributes:
        directory: where it is.
        spec: their sizes.
        state: their tensors, by their names in the checkpoint.

    """

    directory: Path
    spec: HeadsSpec
    state: dict[str, torch.Tensor]

    @classmethod
    def read(cls, directory: Path) -> InitialHeads:
        """Read a checkpoint; raises ``ValueError`` if it is damaged, ``OSError`` if a file cannot be read."""
        return cls(directory, read_spec(directory), read_state(directory))

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """The tokens that the heads can draft; None for all."""
        return DraftVocabulary(self.state[TOKEN_MAP]) if TOKEN_MAP in self.state else None

    def copy_to(self, heads: TrainableHeads) -> None:
        """Copy the weights into a run's heads.

        The draft vocabulary may be another one where the LM head is the target's: its rows are not trained. Layers
        without biases go on as what they are: layers whose biases are zero.

        Raises:
            ValueError: the run's heads have other sizes.

        """
        wanted, has = (asdict(replace(spec, fc_bias=True)) for spec in (heads.spec, self.spec))
        copied = self.state
        if heads.spec.shared_lm_head and self.spec.shared_lm_head:
            del wanted["draft_vocab_size"], has["draft_vocab_size"]
            trained = {name for name, parameter in heads.named_parameters() if parameter.requires_grad}
            copied = {name: each for name, each in copied.items() if name in trained}
        for name, value in has.items():
            if wanted[name] != value:
                raise ValueError(
                    f"initial_heads {str(self.directory)!r} has {name} {value}, the run {wanted[name]}; give the run "
                    "the settings of these heads, or leave initial_heads out"
                )
        heads.load_state_dict(copied, strict=False)
