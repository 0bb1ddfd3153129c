# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face configuration of a heads' checkpoint."""

from __future__ import annotations

import os
from typing import Any

from transformers import PretrainedConfig

MODEL_TYPE = "vllm_medusa"
"""vLLM 0.32 has a configuration of its own under ``medusa``."""

ARCHITECTURE = "VllmMedusaHeads"


class MedusaHeadsConfig(PretrainedConfig):
    """The heads' ``config.json`` in vLLM 0.32's Medusa format; sizes that are missing are taken from the target.

    Attributes:
        num_heads: K, the number of heads; the only required key.
        num_hidden_layers: residual layers per head.
        hidden_size: the target's hidden size; 0 if not given.
        vocab_size: the target's vocabulary size; 0 if not given.
        truncated_vocab_size: rows of the heads' LM heads; fewer than ``vocab_size`` with a ``token_map``.
        original_lm_head: whether all heads use the target's LM head; the checkpoint then needs none.
        sequential_path_rank: rank of the layers with which heads read the path to a node; None for plain heads.
        logit_scale: factor on the heads' logits.
        medusa_tree: the best tree for these heads, in the form of the option ``medusa_tree``; None if not calibrated.
        medusa_accuracies: ``[heads][ranks]``, held-out accuracies; sparse trees are grown from them.
        medusa_path_accuracies: the share of held-out positions at which all of a path's ranks are right, by paths such
            as "0,2"; sparse trees are grown from these where there are enough.
        medusa_temperatures: one for each head, by which its logits are divided where its probabilities are read; None
            leaves them as they are.
        medusa_lookup_weights: ``[heads][match lengths]``: how far what followed the longest match of a node's path
            earlier in the text is trusted, by the match's length from 1 on, the last for all longer ones; None if that
            was not measured, and then it is not drafted.

    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        num_heads: int = 0,
        num_hidden_layers: int = 1,
        hidden_size: int | None = 0,
        vocab_size: int | None = 0,
        truncated_vocab_size: int | None = None,
        original_lm_head: bool = False,
        sequential_path_rank: int | None = None,
        logit_scale: float = 1.0,
        medusa_tree: str | list[Any] | None = None,
        medusa_accuracies: list[list[float]] | None = None,
        medusa_path_accuracies: dict[str, float] | None = None,
        medusa_temperatures: list[float] | None = None,
        medusa_lookup_weights: list[list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size or 0
        self.vocab_size = vocab_size or 0
        self.truncated_vocab_size = truncated_vocab_size
        self.original_lm_head = original_lm_head
        self.sequential_path_rank = sequential_path_rank
        self.logit_scale = logit_scale
        self.medusa_tree = medusa_tree
        self.medusa_accuracies = medusa_accuracies
        self.medusa_path_accuracies = medusa_path_accuracies
        self.medusa_temperatures = medusa_temperatures
        self.medusa_lookup_weights = medusa_lookup_weights
        # vLLM reads attention sizes and a maximum length from every model's config; Medusa heads have neither.
        self.num_attention_heads = 0
        self.num_key_value_heads = 0
        self.head_dim = 0
        self.max_seq_len = 2**20
        kwargs["architectures"] = [ARCHITECTURE]
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> MedusaHeadsConfig:
        """Read ``config.json`` from a directory or repository; published ones may lack ``model_type``.

        Raises:
            ValueError: an entry is wrong.

        """
        # Every process that loads the plugin imports this module; few of them read a checkpoint.
        from vllm_medusa.checkpoint.entries import PUBLISHED_NAMES, check_entries

        kwargs.pop("trust_remote_code", None)
        stored, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_entries(stored, "its config.json")
        known = {PUBLISHED_NAMES.get(key, key): value for key, value in stored.items() if key != "model_type"}
        return cls.from_dict(known, **kwargs)
