# SPDX-License-Identifier: Apache-2.0
"""Read a target's sizes and its LM head without loading the model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.checkpoint.weight_files import Weights
from vllm_medusa.messages import shortened_message


def read_lm_head(target: Path, *, trust_remote_code: bool = False) -> torch.Tensor:
    """Return a model's LM head, ``[vocab_size, hidden_size]``, which is the embedding if the two are tied.

    Args:
        target: the model's directory.
        trust_remote_code: whether code in it may run.

    Raises:
        ValueError: the model is no causal language model, or its weights lack the tensor.

    """
    config = _model_config(target, trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # A stranger's config can fail anywhere in the model's constructor.
        raise ValueError(f"{target} is no causal language model ({shortened_message(error)})") from None
    modules = {module: name for name, module in model.named_modules()}
    weights = Weights.find(target)
    stored = set(weights)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        name = f"{modules[module]}.weight"
        if name in stored:
            return weights.load([name])[name]
        if not config.get_text_config().tie_word_embeddings:
            break
    raise ValueError(f"the weights in {target} lack {name}, the LM head that the heads share; download the model again")


def check_sizes(spec: HeadsSpec, target: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ``ValueError`` if the heads' sizes differ from their target's; arguments as for ``read_lm_head``."""
    config = _model_config(target, trust_remote_code).get_text_config()
    for name in ("hidden_size", "vocab_size"):
        found, expected = getattr(spec, name), getattr(config, name)
        if found != expected:
            raise ValueError(
                f"the heads have {name} {found}, the target in {target} has {expected}; "
                "give the target that the heads were trained for"
            )


def _model_config(directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # A stranger's config can fail anywhere.
        raise ValueError(f"{directory} holds no model ({shortened_message(error)})") from None
