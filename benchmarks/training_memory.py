# SPDX-License-Identifier: Apache-2.0
"""Peak memory of Medusa-1 training: the loss in chunks against one that holds all heads' logits at once.

Each figure is taken in a process of its own, as the highest resident set (``ru_maxrss``) on the CPU. The target is a
random Llama, vocabulary 32000 and hidden size 512, in fp32; what is measured is memory, so its weights do not matter.
Training holds, besides logits, the heads' gradients and AdamW's moments: about 800 MiB here.

On 2 CPU cores, in 2 minutes, it printed (MiB): loaded 976, forward pass of the target 1077, loss in chunks 2032, all
logits at once 3840.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from enum import StrEnum

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.training.config import Recipe
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.losses import IGNORED, medusa_loss
from vllm_medusa.training.medusa1 import Medusa1

RECIPE = Recipe(num_heads=4)
STEPS = 2


class Case(StrEnum):
    LOADED = "target and heads loaded"
    TARGET_ONLY = "target's forward pass, heads not trained"
    CHUNKED = "training, loss in chunks"
    WHOLE = "training, all heads' logits at once"


def build() -> Medusa1:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return Medusa1(LlamaForCausalLM(config), RECIPE).train()


def whole_loss(heads: TrainableHeads, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same loss from the logits of all heads at all positions, ``[heads, batch, length, vocab_size]``."""
    total = hidden.new_zeros(())
    logits_of_all_heads = torch.stack([heads.logits(head, hidden) for head in range(heads.spec.num_heads)])
    for k, logits in enumerate(logits_of_all_heads, start=1):
        shifted = logits[:, : -1 - k].flatten(0, 1)
        total = total + RECIPE.decay**k * functional.cross_entropy(
            shifted, labels[:, 1 + k :].flatten(), ignore_index=IGNORED
        )
    return total


def measure(case: Case, batch: int, length: int, chunk_size: int) -> float:
    """Run a case and return the process's peak memory in MiB."""
    from vllm_medusa.training.hidden import final_hidden_states

    model = build()
    if case is not Case.LOADED:
        tokens = torch.randint(32000, (batch, length))
        optimizer = torch.optim.AdamW(model.heads.parameters(), fused=True)
        for _ in range(STEPS):
            with torch.no_grad():
                hidden = final_hidden_states(model.target, tokens)
            if case is Case.TARGET_ONLY:
                continue
            if case is Case.CHUNKED:
                loss = medusa_loss(model.heads, hidden, tokens, RECIPE.decay, chunk_size)
            else:
                loss = whole_loss(model.heads, hidden, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--case", choices=list(Case), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(measure(Case(options.case), options.batch, options.length, options.chunk_size))
        return
    table = Table(title=f"{options.batch} blocks of {options.length} tokens, 4 heads, chunks of {options.chunk_size}")
    table.add_column("")
    table.add_column("peak MiB", justify="right")
    table.add_column("above loaded", justify="right")
    loaded = 0.0
    for case in Case:
        peak = float(subprocess.check_output([sys.executable, *sys.argv, "--case", case], text=True).split()[-1])
        loaded = loaded or peak
        table.add_row(case, f"{peak:.0f}", f"{peak - loaded:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
