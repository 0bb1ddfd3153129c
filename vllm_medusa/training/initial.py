# SPDX-License-Identifier: Apache-2.0
"""Heads that were trained before, with which a run begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
        """Copy the weights into a run's heads; raises ``ValueError`` if those have other sizes."""
        wanted = asdict(heads.spec)
        for name, value in asdict(self.spec).items():
            if wanted[name] != value:
                raise ValueError(
                    f"initial_heads {str(self.directory)!r} has {name} {value}, the run {wanted[name]}; give the run "
                    "the settings of these heads, or leave initial_heads out"
                )
        # A shared LM head over all tokens is the target's, and not in the checkpoint.
        heads.load_state_dict(self.state, strict=False)
