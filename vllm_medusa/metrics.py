# SPDX-License-Identifier: Apache-2.0
"""What speculation gives, in vLLM's log and at ``/metrics``: a ``vllm.stat_logger_plugins`` logger of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_medusa.compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

LABELS = ("model_name", "engine")


@dataclass
class Totals:
    """What the requests' decode steps have done; one request in one step of the engine counts as a step.

    Attributes:
        steps: steps that emitted tokens behind a prompt.
        drafted: those that verified a draft.
        nodes: verified nodes.
        accepted: ``[depth]``: accepted nodes of each depth.

    """

    steps: int = 0
    drafted: int = 0
    nodes: int = 0
    accepted: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, steps: int, drafts: SpecDecodingStats | None) -> Totals:
        """Read what vLLM counts in an iteration; its positions are depths, for one node of a depth is accepted."""
        if drafts is None:
            return cls(steps)
        accepted = [count for count in drafts.num_accepted_tokens_per_pos if count]
        # What ends in an iteration, or is aborted, may be missing among its steps.
        return cls(max(steps, drafts.num_drafts), drafts.num_drafts, drafts.num_draft_tokens, accepted)

    def add(self, other: Totals) -> None:
        self.steps += other.steps
        self.drafted += other.drafted
        self.nodes += other.nodes
        self.accepted += [0] * (len(other.accepted) - len(self.accepted))
        for depth, count in enumerate(other.accepted):
            self.accepted[depth] += count

    def line(self) -> str:
        """Return the line of the log; there must have been steps."""
        depths = ", ".join(f"{count / self.drafted:.2f}" for count in self.accepted) if self.drafted else "none"
        return (
            f"Medusa: {1 + sum(self.accepted) / self.steps:.2f} tokens per step, {self.nodes / self.steps:.1f} nodes "
            f"verified for them, {1 - self.drafted / self.steps:.0%} of steps without a draft; drafts accepted to "
            f"depth 1, 2, ...: {depths}"
        )


@dataclass(frozen=True)
class Counters:
    """One engine's counters at ``/metrics``.

    Attributes:
        steps: see ``Totals``, as the next two.
        drafted: steps that verified a draft.
        nodes: verified nodes.
        accepted: accepted nodes of a model and engine, which are ``labels``, by depth.
        labels: the model's name and the engine's index.

    """

    steps: Counter
    drafted: Counter
    nodes: Counter
    accepted: Counter
    labels: tuple[str, str]

    @classmethod
    def of(cls, model: str, engine: str) -> Counters:
        """Return an engine's counters; they appear at once, with 0."""
        labels = model, engine
        steps, drafted, nodes, accepted = _families()
        return cls(steps.labels(*labels), drafted.labels(*labels), nodes.labels(*labels), accepted, labels)

    def add(self, totals: Totals) -> None:
        self.steps.inc(totals.steps)
        self.drafted.inc(totals.drafted)
        self.nodes.inc(totals.nodes)
        for depth, count in enumerate(totals.accepted, start=1):
            self.accepted.labels(*self.labels, str(depth)).inc(count)


@cache
def _families() -> tuple[Counter, Counter, Counter, Counter]:
    """Return the process's counters; Prometheus refuses a name twice."""
    return (
        Counter("medusa:steps", "Steps of requests that emitted tokens behind their prompts.", LABELS),
        Counter("medusa:drafted_steps", "Steps of requests that verified a draft.", LABELS),
        Counter("medusa:verified_nodes", "Verified nodes of drafts.", LABELS),
        Counter("medusa:accepted_nodes", "Accepted nodes, by their depth.", (*LABELS, "depth")),
    )


class MedusaStatLogger(StatLoggerBase):
    """Counts and logs; does nothing for an engine without Medusa."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._since_last_line = Totals()
        self._counters: Counters | None = None
        if vllm_config.speculative_config is None:
            return
        from vllm_medusa.config import medusa_config

        if medusa_config(vllm_config) is not None:
            self._counters = Counters.of(str(vllm_config.model_config.served_model_name), str(engine_index))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count an iteration."""
        if self._counters is None or scheduler_stats is None or iteration_stats is None:
            return
        found = Totals.of(len(iteration_stats.inter_token_latencies_iter), scheduler_stats.spec_decoding_stats)
        self._since_last_line.add(found)
        self._counters.add(found)

    def log(self) -> None:
        """Log what was done since the last line, if anything was."""
        totals, self._since_last_line = self._since_last_line, Totals()
        if totals.steps:
            logger.info(totals.line())

    def log_engine_initialized(self) -> None:
        """Say nothing: the start has a line of its own."""
