# SPDX-License-Identifier: Apache-2.0
"""The device's rates, and the kernels around a step: its trees, the walk and the commit. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from gpu_bench.lines import Line
from gpu_bench.models import AttentionShape
from gpu_bench.roofline import Rates, Work
from gpu_bench.timing import measure_rates, seconds
from vllm_medusa.tree.topology import DraftTree

PART = "kernels"
WORD = 8
"""Bytes of an int64, which rows, tokens and bitmasks are."""

BLOCK_SIZE = 16


def draft_tree(rows: int) -> DraftTree:
    """Return a tree of that many rows, at most four children each."""
    return DraftTree.from_parents([-1, *((row - 1) // 4 for row in range(1, rows))])


@dataclass(frozen=True)
class Sizes:
    """What the rates and kernels are measured with.

    Attributes:
        device: "cuda" or "cpu".
        dtypes: of the products whose rate is measured.
        copied_bytes: of the copy.
        side: of the products' square matrices.
        rows: of each request's tree.
        requests: in which numbers.
        layers: of the model whose keys and values are committed.
        shape: its attention.

    """

    device: str
    dtypes: tuple[str, ...]
    copied_bytes: int
    side: int
    rows: int
    requests: tuple[int, ...]
    layers: int
    shape: AttentionShape


class Device:
    """Measures what needs no engine."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, self._device = sizes, torch.device(sizes.device)

    def name(self) -> str | None:
        """Return the GPU's name."""
        return torch.cuda.get_device_name() if self._device.type == "cuda" else None

    def free_bytes(self) -> int:
        """Return how much of the GPU's memory is free, 0 without one."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] if self._device.type == "cuda" else 0

    @torch.inference_mode()
    def rates(self) -> Rates:
        """Measure the rates that floors are made of."""
        sizes = self._sizes
        return measure_rates(sizes.dtypes, sizes.copied_bytes, sizes.side, self._device)

    @torch.inference_mode()
    def lines(self, rates: Rates) -> list[Line]:
        """Time deriving the trees, walking, and committing one branch per request in all layers, from CUDA graphs."""
        lines = []
        for requests in self._sizes.requests:
            step = _Step(self._sizes, requests, self._device)
            for name, call, moved in (
                ("derive trees", step.derive, step.derived_bytes),
                ("walk", step.walk, step.walked_bytes),
                ("commit", step.commit, step.committed_bytes),
            ):
                what = f"{name}, {requests} x {self._sizes.rows} rows"
                taken = seconds([call], self._device)
                lines.append(
                    Line.timed(PART, what, taken, "µs", rates.floor([Work(moved)]), details={"requests": requests})
                )
        return lines


class _Step:
    """A step in which every request verifies the same tree; each row's token is its index."""

    def __init__(self, sizes: Sizes, requests: int, device: torch.device) -> None:
        from vllm_medusa.acceptance.walk_kernel import walk_drawn
        from vllm_medusa.kv_cache.kernel_commit import CacheTable, move_accepted
        from vllm_medusa.step.derive_kernel import derive_trees_on_device
        from vllm_medusa.step.trees import StepTrees

        tree, shape, rows = draft_tree(sizes.rows), sizes.shape, sizes.rows
        total = requests * rows
        starts = torch.arange(0, total + 1, rows, dtype=torch.int32, device=device)
        row = torch.arange(total, device=device)
        buffers = StepTrees.allocate(rows - 1, requests, total, device)
        parents = tree.parents[None, 1:].repeat(requests, 1).to(device)
        states = torch.arange(requests, device=device)
        # Each call moves the positions further, which takes as long wherever they are.
        ids, positions = row.int(), torch.zeros_like(row)
        self.derive: Callable[[], StepTrees] = lambda: derive_trees_on_device(
            parents=parents,
            idx_mapping=states,
            query_start_loc=starts,
            cu_num_rows=starts,
            logits_indices=row,
            input_ids=ids,
            positions=positions,
            max_depth=tree.depth,
            num_drafting_reqs=requests,
            buffers=buffers,
        )
        trees = replace(self.derive(), tokens=row.clone())
        # Each row's draw is carried by its last child.
        drawn = torch.zeros_like(row).index_put_((trees.parents.clamp(min=0),), row)
        self.walk = lambda: walk_drawn(trees, drawn, rows)
        accepted = self.walk()
        caches = [
            torch.zeros(total // BLOCK_SIZE + 1, BLOCK_SIZE, shape.kv_heads, 2 * shape.head_dim, device=device).to(
                getattr(torch, shape.cache_dtype)
            )
            for _ in range(sizes.layers)
        ]
        (table,) = CacheTable.group(caches)
        # The tables hold no memory, so the call keeps what they point to.
        self.commit = lambda caches=caches: move_accepted(table, trees, accepted, row)
        levels = accepted.rows.shape[1]
        moved = int(((accepted.rows >= 0) & (accepted.rows != starts[:-1, None] + torch.arange(levels).to(row))).sum())
        words = buffers.ancestor_bits.shape[1]
        self.derived_bytes = total * WORD * (6 + words)
        self.walked_bytes = WORD * (3 * total + 2 * requests * levels)
        self.committed_bytes = 2 * moved * sizes.layers * shape.slot_bytes
