# SPDX-License-Identifier: Apache-2.0
"""Turn a GGUF file, weights in quantised blocks with their tokenizer, into a directory that vLLM and training read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vllm_medusa.files import replaced_directory, write_json
from vllm_medusa.versions import installed_versions

ORIGIN_FILE = "origin.json"
"""Where the weights of a dequantised model come from."""

REQUIREMENTS = ("gguf", "accelerate")
"""The packages with which ``transformers`` reads GGUF files."""


def require_gguf() -> None:
    """Raise ``ValueError`` if a package is missing without which GGUF files cannot be read."""
    for package in REQUIREMENTS:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"GGUF files need {package}, which is not installed; install vllm-medusa[train]")


def dequantise(file: Path, output: Path, origin: dict[str, str]) -> None:
    """Write a GGUF file's model in bf16, with its tokenizer and chat template.

    Args:
        file: a GGUF file of an architecture that ``transformers`` knows.
        output: the directory to write or replace; it appears only when it is complete.
        origin: kept in ``origin.json``, with the versions of the packages that wrote the model.

    Raises:
        ValueError: a package is missing, or the file holds no causal language model that can be read.
        OSError: a file cannot be read or written.

    """
    require_gguf()
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file} is no GGUF file: it does not start with the letters GGUF")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except Exception as error:  # The readers raise whatever they stumble over; tokenizers even a bare Exception.
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    with replaced_directory(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / ORIGIN_FILE, {**origin, "versions": installed_versions()})
