# SPDX-License-Identifier: Apache-2.0
"""Convert heads' checkpoints from a published layout to the one that vLLM serves, and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vllm_medusa.checkpoint.confined import require_inside
from vllm_medusa.checkpoint.entries import refuse_hydra
from vllm_medusa.checkpoint.format import CONFIG_FILE, HeadsSpec, write_heads
from vllm_medusa.checkpoint.published import (
    BASE_MODEL,
    HeadNames,
    HeadTensor,
    PublishedHeads,
    read_published,
    write_original,
)
from vllm_medusa.checkpoint.target import check_sizes, read_lm_head
from vllm_medusa.checkpoint.weight_files import WeightFile, Weights
from vllm_medusa.files import read_json, replaced_directory, write_json

HEADS_DIRECTORY = "heads"
TARGET_DIRECTORY = "target"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}


class Layout(StrEnum):
    """A layout to write: vLLM 0.32's, or that of the original repository's ``medusa_lm_head.pt``."""

    SERVED = "served"
    ORIGINAL = "original"


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        heads: the heads' directory.
        target: the target's directory if the checkpoint was a whole model; None if it held only heads.
        spec: the heads' sizes.
        dtype: the dtype of the heads' first layer.

    """

    heads: Path
    target: Path | None
    spec: HeadsSpec
    dtype: torch.dtype


def convert(
    source: Path,
    output: Path,
    layout: Layout,
    target: Path | None = None,
    base_model: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Conversion:
    """Convert a checkpoint; tensors keep their values and dtypes, and the config keeps its entries other than sizes.

    A Medusa-2 checkpoint is a whole model with heads in it. It is split into ``output/heads`` and ``output/target``,
    one weight file at a time, so that the model need not fit into memory.

    Args:
        source: a checkpoint in any layout of ``vllm_medusa.checkpoint.published``.
        output: the directory to write; it appears only when it is complete.
        layout: the layout to write.
        target: the heads' target model. Sizes are checked against it. Heads without LM heads get the target's.
        base_model: the target's name for the heads' config, if the config has none yet; default: ``target``'s path.
        trust_remote_code: whether code in the target's directory may run.

    Raises:
        ValueError: the layout is unknown, tensors are missing or do not fit the target, ``output`` is not empty, or
            the original layout is requested and the heads' config does not name their target.
        OSError: a file cannot be read or written.

    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; give a directory that does not exist")
    config = read_config(source)
    weights = Weights.find(source)
    whole_model = bool(HeadNames.of(weights).others)
    with replaced_directory(output) as temporary:
        if whole_model:
            write_target(source, weights, config, temporary / TARGET_DIRECTORY)
            target = temporary / TARGET_DIRECTORY if target is None else target
            config = _heads_entries(config) | {BASE_MODEL: str(output / TARGET_DIRECTORY)}
        elif target is not None:
            config = {BASE_MODEL: base_model or str(target)} | config
        lm_head = None if target is None else partial(read_lm_head, target, trust_remote_code=trust_remote_code)
        heads = read_published(weights, config, lm_head)
        if target is not None:
            check_sizes(heads.spec, target, trust_remote_code=trust_remote_code)
        _write(temporary / HEADS_DIRECTORY if whole_model else temporary, heads, layout)
    return Conversion(
        heads=output / HEADS_DIRECTORY if whole_model else output,
        target=output / TARGET_DIRECTORY if whole_model else None,
        spec=heads.spec,
        dtype=heads.state["blocks.0.layers.0.weight"].dtype,
    )


def write_target(source: Path, weights: Weights, config: Mapping[str, Any], directory: Path) -> None:
    """Write a Medusa-2 checkpoint's model and tokenizer without the heads, one weight file at a time."""
    directory.mkdir()
    kept = {file: [name for name in names if HeadTensor.parse(name) is None] for file, names in weights.names.items()}
    kept = {file: names for file, names in kept.items() if names}
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, (file, names) in enumerate(kept.items(), start=1):
        shard = f"model-{number:05}-of-{len(kept):05}.safetensors" if len(kept) > 1 else SAFE_WEIGHTS_NAME
        total_size += _copy_tensors(file, names, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    if len(kept) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(directory / SAFE_WEIGHTS_INDEX_NAME, index)
    write_json(directory / CONFIG_FILE, _target_entries(config))
    for path in source.iterdir():
        weights_or_config = path.suffix in WEIGHT_SUFFIXES or path.name.endswith((".index.json", CONFIG_FILE))
        if path.is_file() and not weights_or_config:
            require_inside(path)
            shutil.copy(path, directory)


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json``, or an empty dict if there is none: the sizes are read from the tensors."""
    path = directory / CONFIG_FILE
    if not path.exists():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object; download it again")
    refuse_hydra(config, str(path))
    return config


def _copy_tensors(file: WeightFile, names: list[str], path: Path) -> int:
    """Copy tensors from one file to another and return their size in bytes. The tensors are freed on return."""
    tensors = {name: tensor.contiguous() for name, tensor in file.load(names).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _write(directory: Path, heads: PublishedHeads, layout: Layout) -> None:
    if layout is Layout.ORIGINAL:
        write_original(directory, heads)
    else:
        write_heads(directory, heads.spec, heads.state, heads.extra)


def _heads_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a Medusa-2 model's config that describe its heads."""
    return {key: value for key, value in config.items() if key.startswith("medusa_")}


def _target_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other entries; ``architectures`` becomes the model type's standard one, without Medusa code."""
    entries = {key: value for key, value in config.items() if not key.startswith("medusa_")}
    if plain := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type"))):
        entries["architectures"] = [plain]
    return entries
