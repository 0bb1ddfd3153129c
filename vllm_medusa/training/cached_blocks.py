# SPDX-License-Identifier: Apache-2.0
"""Blocks with what a frozen target makes of them, computed once and then read from disk."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from vllm_medusa.progress import progress
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.hidden import final_hidden_states
from vllm_medusa.training.hidden_cache import GIB, CacheKey, HiddenCache
from vllm_medusa.training.target_logits import TargetLogits
from vllm_medusa.training.teacher import Teacher, num_top_tokens

CACHE_DIRECTORY = "hidden_states"

SAMPLED = 256
"""Of each of the target's weights, about so many numbers tell it from another's."""

NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version")
"""Entries of a model's config that say where it came from."""


class CachedBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks, each with its columns of a complete cache.

    Args:
        blocks: ``{"input_ids": [length], "labels": [length]}`` each.
        cache: it holds these blocks' outputs one after another.
        first: the row of the first block.
        columns: names of the columns to read.

    """

    def __init__(self, blocks: datasets.Dataset, cache: HiddenCache, first: int, columns: Iterable[str]) -> None:
        self.blocks, self.cache, self.first, self.columns = blocks, cache, first, tuple(columns)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.blocks[index], **self.cache.block(self.first + index, self.columns)}


def cached_blocks(
    config: TrainConfig,
    target: PreTrainedModel,
    device: torch.device,
    parts: tuple[datasets.Dataset, datasets.Dataset],
    show_progress: bool = True,
) -> tuple[CachedBlocks, CachedBlocks]:
    """Complete the cache of the target's outputs for the training and the held-out blocks, and return both with it.

    Of several processes one writes while the others wait.

    Raises:
        ValueError: the cache is of something else, or the disk has no room.
        OSError: the cache cannot be written.

    """
    directory = config.cache_directory or config.output / CACHE_DIRECTORY
    with HiddenCache.locked(directory, cache_key(config, target, parts)) as cache:
        if not cache.complete:
            _fill(cache, config, target.to(device), parts, show_progress)
    columns = ["hidden", *(["top_tokens", "top_log_probs"] if config.heads_loss == "kl" else [])]
    training, held_out = parts
    return CachedBlocks(training, cache, 0, columns), CachedBlocks(held_out, cache, len(training), columns)


def cache_key(config: TrainConfig, target: PreTrainedModel, parts: Iterable[datasets.Dataset]) -> CacheKey:
    """Return what the outputs depend on."""
    data, blocks = hashlib.sha256(), 0
    for part in parts:
        for batch in part.with_format("numpy").iter(1024):
            data.update(batch["input_ids"].astype(np.int32).tobytes())
            blocks += len(batch["input_ids"])
    lm_head = target.get_output_embeddings().weight
    return CacheKey(
        target=_fingerprint(target, config.mixed_precision),
        data=data.hexdigest(),
        blocks=blocks,
        length=config.block_length,
        hidden_size=lm_head.shape[1],
        top_tokens=num_top_tokens(len(lm_head)) if config.heads_loss == "kl" else 0,
    )


def _fingerprint(target: PreTrainedModel, precision: str) -> str:
    """Hash a loaded target's config, a sample of its weights, and the precision of its products."""
    settings = {name: value for name, value in target.config.to_dict().items() if name not in NOT_COMPUTED_WITH}
    found = hashlib.sha256(repr((sorted(settings.items(), key=str), precision)).encode())
    for name, parameter in target.named_parameters():
        flat = parameter.detach().flatten()
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        found.update(flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def _fill(
    cache: HiddenCache, config: TrainConfig, target: PreTrainedModel, parts: Iterable[datasets.Dataset], show: bool
) -> None:
    if show:
        size = f"{cache.num_bytes / GIB:.2f} GiB for {cache.key.blocks} blocks of {cache.key.length} tokens"
        print(f"Hidden states are kept in {cache.directory}: {size}", file=sys.stderr, flush=True)
    cache.check_room()
    cache.begin()
    teacher = Teacher(TargetLogits(target), config.chunk_size) if cache.key.top_tokens else None
    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    autocast = torch.autocast(target.device.type, dtype=precision, enabled=precision is not None)
    target.eval()
    with progress("Hidden states, blocks", cache.key.blocks, show, done=cache.done) as shown, autocast:
        for tokens in _batches(parts, cache.done, config.batch_size):
            hidden = final_hidden_states(target, tokens.to(target.device))
            outputs = {"hidden": hidden}
            if teacher is not None:
                top = teacher(hidden)
                outputs |= {"top_tokens": top.tokens, "top_log_probs": top.log_probs}
            cache.append(outputs)
            shown.advance(len(tokens), tokens=tokens.numel())


def _batches(parts: Iterable[datasets.Dataset], skipped: int, size: int) -> Iterator[torch.Tensor]:
    """Yield the token ids of all blocks after the first ``skipped``, ``[at most size, length]``, int64."""
    for part in parts:
        for start in range(min(skipped, len(part)), len(part), size):
            yield part[start : start + size]["input_ids"]
        skipped = max(0, skipped - len(part))
