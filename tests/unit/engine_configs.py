# SPDX-License-Identifier: Apache-2.0
"""Engines' configurations with Medusa, for models that nobody loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_medusa.config import MedusaSpeculativeConfig, medusa_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
HEADS = {"hidden_size": 64, "vocab_size": 96, "num_heads": 4, "num_hidden_layers": 1}
"""A published ``config.json`` has no model_type, nor an architecture."""


class Models:
    """Writes the configurations of models that nobody loads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, name: str, config: dict[str, Any]) -> str:
        (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / name / "config.json").write_text(json.dumps(config))
        return str(self.directory / name)

    def heads(self, **changes: Any) -> str:
        """Heads with a whole weight file, of which nothing is read."""
        directory = self.write("heads", {**HEADS, **changes})
        save_file({"blocks.0.layers.0.weight": torch.zeros(1)}, Path(directory) / "model.safetensors")
        return directory

    def configure(self, options: dict[str, Any], target: dict[str, Any] = LLAMA, **engine: Any) -> VllmConfig:
        """The engine's configuration for these options; heads that fit the target unless a model is given."""
        heads = options.pop("model", None) or self.heads()
        return self.start({"method": "medusa", "model": heads, **options}, target, **engine)

    def start(self, speculative: dict[str, Any], target: dict[str, Any] = LLAMA, **engine: Any) -> VllmConfig:
        """The engine's configuration with this ``--speculative-config``."""
        return EngineArgs(
            model=self.write("target", target),
            speculative_config=speculative,
            skip_tokenizer_init=True,
            enforce_eager=True,
            **engine,
        ).create_engine_config()

    def medusa(self, options: dict[str, Any], **engine: Any) -> MedusaSpeculativeConfig:
        config = medusa_config(self.configure(options, **engine))
        assert config is not None
        return config

    def refusal(self, options: dict[str, Any], **engine: Any) -> str:
        """The one line with which the engine refuses to start."""
        with pytest.raises(ValueError) as refused:
            self.configure(options, **engine)
        message = str(refused.value)
        assert "\n" not in message
        return message
