"""Text that a target writes itself: what its heads must foretell when it decodes."""

from __future__ import annotations

import torch
from rich.progress import track
from transformers import PreTrainedModel


@torch.no_grad()
def continue_blocks(
    target: PreTrainedModel, prompts: torch.Tensor, length: int, batch_size: int = 64, show_progress: bool = True
) -> torch.Tensor:
    """Let a target continue prompts greedily.

    Args:
        target: a causal language model of ``transformers``.
        prompts: ``[prompts, prompt_length]``, int64.
        length: tokens per text, the prompt's included.
        batch_size: texts written at a time.
        show_progress: whether to draw a progress bar.

    Returns:
        ``[prompts, length]``, int64.

    """
    new_tokens = length - prompts.shape[1]
    batches = track(prompts.split(batch_size), "Target's own text", disable=not show_progress)
    return torch.cat(
        [
            target.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
            for batch in batches
        ]
    )
