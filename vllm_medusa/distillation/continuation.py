# SPDX-License-Identifier: Apache-2.0
"""Let a target of ``transformers`` continue prompts, given and returned as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def continue_prompts(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int = 8,
    show_progress: bool = True,
    min_new_tokens: int = 0,
) -> list[Sample]:
    """Continue prompts greedily, up to and including the end-of-sequence token.

    Args:
        target: a causal language model of ``transformers``.
        prompts: token ids, at least one per prompt.
        new_tokens: the longest continuation.
        batch_size: prompts per batch.
        show_progress: whether to show progress.
        min_new_tokens: the end-of-sequence token cannot be chosen before so many tokens.

    Returns:
        Each prompt with its continuation, which has labels; the prompt has none.

    """
    samples: dict[int, Sample] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    with progress("Target's text, batches", len(batches), show_progress) as shown:
        for batch in batches:
            written = _continue_batch(target, [prompts[index] for index in batch], new_tokens, min_new_tokens)
            samples |= zip(batch, written, strict=True)
            shown.advance(tokens=sum(map(len, written)) - sum(len(prompts[index]) for index in batch))
    return [samples[index] for index in range(len(prompts))]


def _continue_batch(
    target: PreTrainedModel, prompts: list[Sequence[int]], new_tokens: int, min_new_tokens: int
) -> list[Sample]:
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ends = _end_tokens(target)
    written = target.generate(
        tokens.to(target.device),
        attention_mask=mask.to(target.device),
        do_sample=False,
        min_new_tokens=min_new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=min(ends, default=0),
    )[:, longest:].tolist()
    samples = []
    for prompt, continuation in zip(prompts, written, strict=True):
        end = next((index for index, token in enumerate(continuation) if token in ends), len(continuation))
        kept = continuation[: end + 1]
        samples.append(Sample([*prompt, *kept], [IGNORED] * len(prompt) + kept))
    return samples


def _end_tokens(target: PreTrainedModel) -> set[int]:
    ends = target.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
