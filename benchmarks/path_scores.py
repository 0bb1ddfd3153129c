# SPDX-License-Identifier: Apache-2.0
"""Which score of a path is most often true for heads that do not read it: the product of its tokens' probabilities, the
least of them, or the geometric mean of the two along the chain of top-1 tokens (below it tokens multiply).

Temperatures are fitted on every other text. On the others, where steps begin, trees are drafted by each score, without
and with temperatures, and compared with the text: tokens per step by the scores and by the text, and the expected
calibration error of the nodes of each depth. docs/training.md has what it printed.

    python benchmarks/path_scores.py --target TARGET --heads HEADS --data HELD_OUT.jsonl
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_medusa.data.dataset import read_samples
from vllm_medusa.data.packing import Sample
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.evaluation.measure import load_heads, where_steps_begin
from vllm_medusa.evaluation.reading import ReadText, read_texts, states_of_target
from vllm_medusa.evaluation.reliability import Positions, draft_reliability
from vllm_medusa.evaluation.served import ServedHeads
from vllm_medusa.evaluation.temperatures import best_temperature
from vllm_medusa.tree.dynamic import DynamicTree

RANKS = 10


class Bounded(DynamicTree):
    """Judges a path between the product of its tokens' probabilities and the least of them.

    Attributes:
        weight: of the product, from 0 to 1; the logarithms are averaged.
        along: whether only the chain of top-1 tokens is judged so, and tokens below it multiply.

    """

    weight = 1.0
    along = True

    def _scores(self, log_probs: torch.Tensor) -> torch.Tensor:
        terms = torch.nn.functional.pad(log_probs, (0, 1)).flatten(1)[:, self._terms]
        paths = [(), *map(tuple, self.candidates.choices)]
        ranks = torch.tensor([[*path, *[self.top_k] * (self.num_heads - len(path))] for path in paths])
        judged = (ranks == 0).cummin(dim=1).values if self.along else torch.ones_like(ranks, dtype=torch.bool)
        least = terms.masked_fill(~judged, 0).amin(dim=-1)
        scores = (terms * torch.where(judged, self.weight, 1.0)).sum(dim=-1) + (1 - self.weight) * least
        return scores.nan_to_num_(nan=-math.inf, neginf=-math.inf)


SCORES = {"product": (1.0, True), "geometric mean": (0.5, True), "least": (0.0, False)}
"""The weight of the product, and whether tokens below the chain multiply."""


def read_held_out(
    target: Path, heads: Path, data: Path, num_texts: int, max_length: int
) -> tuple[ServedHeads, list[ReadText]]:
    """Let a target and its heads read the first texts of a file, each cut to a length."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    served = ServedHeads.of(model, load_heads(heads, target, model))
    samples = read_samples([data], AutoTokenizer.from_pretrained(target), BadLineCounter(BadLines.REFUSE))
    cut = [Sample(each.input_ids[:max_length], each.labels[:max_length]) for each in islice(samples, num_texts)]
    return served, read_texts(partial(states_of_target, model), served, cut, RANKS, batch_size=8, show_progress=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True, help="plain heads")
    parser.add_argument("--data", type=Path, required=True, help="text that the target wrote")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--nodes", type=int, nargs="+", default=[7, 31])
    arguments = parser.parse_args()

    served, texts = read_held_out(
        arguments.target, arguments.heads, arguments.data, arguments.texts, arguments.max_length
    )
    heads = served.heads

    steps = list(zip(texts, where_steps_begin(texts, RANKS), strict=True))
    losses = torch.cat([text.losses[begins] for text, begins in steps[::2]])
    temperatures = [best_temperature(losses[:, head]) for head in range(heads.spec.num_heads)]
    judged = Positions.cat([text.at.where(begins[text.kept]) for text, begins in steps[1::2]])
    print("temperatures", [round(each, 3) for each in temperatures], "from", len(losses), "steps,", end=" ")
    print("judged at", len(judged.roots))

    table = Table(title="Dynamic trees by each score")
    for column in ("nodes", "temperatures", "score", "accepted", "by the scores", "error at depths 1, 2, ..."):
        table.add_column(column)
    for nodes in arguments.nodes:
        for fitted in (False, True):
            for name, (weight, along) in SCORES.items():
                tree = Bounded(heads.spec.num_heads, nodes, RANKS, 0.0)
                tree.weight, tree.along = weight, along
                found = draft_reliability(served.at(temperatures) if fitted else served, tree, judged)
                lengths = (f"{each:.3f}" for each in (found.acceptance_length, found.predicted_length))
                errors = " ".join(f"{each.calibration_error:.4f}" for each in found.depths)
                table.add_row(str(nodes), "fitted" if fitted else "1", name, *lengths, errors)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
