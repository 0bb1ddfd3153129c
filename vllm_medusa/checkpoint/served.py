# SPDX-License-Identifier: Apache-2.0
"""Check a heads' directory before an engine reads it: its config, and that its weight files are whole."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from vllm_medusa.checkpoint.confined import indexed_files
from vllm_medusa.checkpoint.entries import has_heads, read_entries
from vllm_medusa.checkpoint.format import CONFIG_FILE
from vllm_medusa.checkpoint.weight_files import WeightFile

PATTERNS = ("*.safetensors", "*.bin", "*.pt")
"""The files from which vLLM loads weights: those of the first pattern that matches any."""


def check_directory(directory: Path) -> None:
    """Check all that can be told without loading tensors.

    Raises:
        ValueError: the config is missing or wrong, or a weight file is damaged; the message is one line.
        OSError: a file cannot be read.

    """
    path = directory / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{directory} has no {CONFIG_FILE}; give the heads' own directory")
    if not has_heads(read_entries(path)):
        raise ValueError(f"{path} has no num_heads, so it is not of heads; give the heads' own directory")
    if (directory / SAFE_WEIGHTS_INDEX_NAME).exists():
        indexed_files(directory / SAFE_WEIGHTS_INDEX_NAME)
    for file in _weight_files(directory):
        WeightFile(file).names()


def require_weights(heads: str) -> None:
    """Raise ``ValueError`` if heads are a directory without weights, as only an engine with dummy weights takes."""
    if Path(heads).is_dir() and not _weight_files(Path(heads)):
        raise ValueError(
            f"speculative_config: {heads!r} holds no weights of heads; it is incomplete, give a directory with a "
            ".safetensors file"
        )


def _weight_files(directory: Path) -> list[Path]:
    found = (sorted(directory.glob(pattern)) for pattern in PATTERNS)
    return next((files for files in found if files), [])
