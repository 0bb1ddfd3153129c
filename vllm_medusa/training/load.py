# SPDX-License-Identifier: Apache-2.0
"""Load the target and its tokenizer for training."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vllm_medusa.training.config import TrainConfig


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(config.target, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"target {config.target!r} has no tokenizer that can be loaded: {error}") from None


def load_target(config: TrainConfig) -> PreTrainedModel:
    """Load the target as ``config`` says; raises ``ValueError`` if that is not possible."""
    if config.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization {config.quantization!r} needs bitsandbytes, "
            "which is not installed; install it, or use 'none'"
        )
    target = load_plain_target(config, **_quantization(config))
    if config.gradient_checkpointing:
        target.gradient_checkpointing_enable({"use_reentrant": False})
    return target


def load_plain_target(config: TrainConfig, **options: Any) -> PreTrainedModel:
    """Load the target on the CPU without quantization, unless ``options`` say otherwise."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            config.target,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=_attention(config),
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"target {config.target!r} is no causal language model that can be loaded: {error}") from None


def _attention(config: TrainConfig) -> str | None:
    """Choose eager attention if the model caps attention scores (Gemma 2): vLLM caps them, SDPA silently does not."""
    model_config = AutoConfig.from_pretrained(config.target, trust_remote_code=config.trust_remote_code)
    return "eager" if getattr(model_config.get_text_config(), "attn_logit_softcapping", None) else None


def _quantization(config: TrainConfig) -> dict[str, Any]:
    if config.quantization == "none":
        return {}
    quantization = BitsAndBytesConfig(
        load_in_8bit=config.quantization == "8bit",
        load_in_4bit=config.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().device}}
