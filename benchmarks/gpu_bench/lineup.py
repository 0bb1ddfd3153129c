# SPDX-License-Identifier: Apache-2.0
"""Who races, with what, and how much of it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from gpu_bench.engines import EngineOptions, Tree, captured_sizes
from gpu_bench.models import Heads, Target
from gpu_bench.roofline import Rates
from gpu_bench.worker import Worker

PROFILED_STEPS = 4
SPARE_BYTES = 4 << 30
"""Of an engine, besides weights and cache: activations, logits, graphs, CUDA itself."""


class Part(StrEnum):
    """What engines are measured for."""

    STEP = "step"
    PROPOSAL = "proposal"
    RACE = "race"


@dataclass(frozen=True)
class HeadsFiles:
    """Heads, and where they are."""

    directory: Path
    sizes: Heads


@dataclass(frozen=True, eq=False)
class Entrant:
    """An engine in the race.

    Attributes:
        name: what tables call it.
        heads: what it drafts with; None decodes plainly.
        tree: its options of ``speculative_config``.
        parts: what it is measured for.
        has_step_goal: whether its step is to cost hardly more than a plain one.

    """

    name: str
    heads: HeadsFiles | None
    tree: dict[str, Any]
    parts: frozenset[Part]
    has_step_goal: bool = False


@dataclass(frozen=True, eq=False)
class Entered:
    """An engine in the race that has started.

    Attributes:
        entrant: which.
        worker: its process.
        tree: what it verifies.

    """

    entrant: Entrant
    worker: Worker
    tree: Tree


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        requests: in which numbers they decode together.
        prompt: tokens of each.
        steps: of a round, in which all requests decode.
        rounds: how many, after one that does not count.
        nodes: of static and dynamic trees.

    """

    requests: tuple[int, ...]
    prompt: int
    steps: int
    rounds: int
    nodes: int

    def most_tokens(self, depth: int) -> int:
        """Return how many tokens a request can emit while it is measured."""
        return (self.steps * (self.rounds + 1) + PROFILED_STEPS + 8) * (depth + 1)


@dataclass(frozen=True)
class Lineup:
    """Who races, with what.

    Attributes:
        target: the target's sizes.
        directory: where it is.
        entrants: the engines; the first one decodes plainly.
        num_heads: heads of each, at most.
        prompts: token ids, as many as the most requests.
        is_made_up: whether weights and prompts are, so that acceptance means nothing.

    """

    target: Target
    directory: Path
    entrants: Sequence[Entrant]
    num_heads: int
    prompts: Sequence[list[int]]
    is_made_up: bool


@dataclass(frozen=True)
class Setting:
    """All that a race needs.

    Attributes:
        sizes: how much is measured.
        lineup: who races.
        options: of all engines.
        rates: of the device.
        free_bytes: of the device's memory; 0 where it does not bound how many engines there are at a time.
        is_gpu: whether goals are judged.
        deadline: by ``time.monotonic``: no engine starts and no round begins after it.

    """

    sizes: Sizes
    lineup: Lineup
    options: EngineOptions
    rates: Rates
    free_bytes: int
    is_gpu: bool
    deadline: float

    @property
    def max_model_len(self) -> int:
        """Tokens of a request, those of its last draft included."""
        return self.sizes.prompt + self.sizes.most_tokens(self.lineup.num_heads) + self.sizes.nodes + 1

    @property
    def cache_bytes(self) -> int:
        """Bytes of an engine's cache: it holds all requests to their ends."""
        block = self.options.block_size
        # One block serves no request.
        tokens = (max(self.sizes.requests) * -(-self.max_model_len // block) + 1) * block
        return tokens * self.lineup.target.layers * self.lineup.target.attention.slot_bytes

    @property
    def at_a_time(self) -> int:
        """How many engines run side by side, plain decoding and at least one other."""
        if not self.free_bytes:
            return 2
        return max(self.free_bytes // (self.lineup.target.weight_bytes + self.cache_bytes + SPARE_BYTES), 2)

    def is_least(self, requests: int) -> bool:
        """Whether these are the fewest requests, with which more than the race is measured."""
        return requests == min(self.sizes.requests)

    def takes_part(self, entrant: Entrant, requests: int) -> bool:
        """Whether an engine decodes so many requests."""
        return Part.RACE in entrant.parts or (bool(entrant.parts) and self.is_least(requests))

    def engine_options(self, rows: int) -> dict[str, Any]:
        """Return the options of an engine with so many rows a request; its graphs are those that it will use."""
        requests = self.sizes.requests
        return self.options.of(
            max_num_seqs=max(requests),
            max_model_len=self.max_model_len,
            kv_cache_memory_bytes=self.cache_bytes,
            load_format="dummy" if self.lineup.is_made_up else "auto",
            compilation_config={"cudagraph_capture_sizes": captured_sizes(requests, rows)},
        )
