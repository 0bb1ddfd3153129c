# SPDX-License-Identifier: Apache-2.0
"""What a budget does, from the process that decides: a line of its log from time to time, and counters.

vLLM has no field in which a worker's figures could travel to its stat loggers. So the line is the worker's own, and its
counters are at ``/metrics`` where Prometheus' client gathers several processes (``PROMETHEUS_MULTIPROC_DIR``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from prometheus_client import Counter
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_medusa.budget.tally import BINS, Tally
from vllm_medusa.compat.log import logger
from vllm_medusa.config import medusa_config
from vllm_medusa.metrics import LABELS

PROBABILITIES = tuple(f"{tenth / BINS}-{(tenth + 1) / BINS}" for tenth in range(BINS))


@dataclass(frozen=True)
class Counters:
    """One engine's counters; see ``Tally`` for each.

    Attributes:
        totals: by the attribute that each counts.
        by_probability: the same, one a tenth.

    """

    totals: dict[str, Counter]
    by_probability: dict[str, list[Counter]]

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Counters:
        """Return an engine's counters; they appear at once, with 0."""
        # The labels of the plugin's other counters, and of vLLM's.
        labels = (
            str(vllm_config.model_config.served_model_name),
            str(vllm_config.parallel_config.data_parallel_index),
        )
        totals, by_probability = _families()
        return cls(
            {name: family.labels(*labels) for name, family in totals.items()},
            {name: [family.labels(*labels, each) for each in PROBABILITIES] for name, family in by_probability.items()},
        )

    def add(self, tally: Tally) -> None:
        for name, counter in self.totals.items():
            counter.inc(getattr(tally, name))
        for name, counters in self.by_probability.items():
            for counter, value in zip(counters, getattr(tally, name).tolist(), strict=True):
                counter.inc(value)


class BudgetReport:
    """Reports a tally every ``VLLM_LOG_STATS_INTERVAL`` seconds, as long as there are steps.

    Args:
        vllm_config: the engine's.
        log: whether to log.
        clock: seconds.

    """

    def __init__(self, vllm_config: VllmConfig, *, log: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._counters = Counters.of(vllm_config)
        self._log = log
        self._clock = clock
        self._due = clock() + envs.VLLM_LOG_STATS_INTERVAL

    def report(self, tally: Tally) -> None:
        """Report if it is time, and let the tally begin anew then."""
        now = self._clock()
        if now < self._due or not tally.steps:
            return
        self._due = now + envs.VLLM_LOG_STATS_INTERVAL
        taken = tally.take()
        self._counters.add(taken)
        if self._log:
            logger.info(line(taken))


def report_of(vllm_config: VllmConfig) -> BudgetReport | None:
    """Return the report of an engine with a budget; None on ranks other than the first, which decide the same."""
    options = medusa_config(vllm_config)
    assert options is not None
    # Lines come where the engine logs its own statistics.
    return BudgetReport(vllm_config, log=options.log_stats) if get_tp_group().is_first_rank else None


def line(tally: Tally) -> str:
    """Return the line of the log; there must have been steps."""
    pairs = ", ".join(
        f"{expected / nodes:.2f} {accepted / nodes:.2f}"
        for nodes, expected, accepted in zip(tally.nodes, tally.expected, tally.accepted, strict=True)
        if nodes
    )
    found = (
        f"Medusa: budget of {tally.chosen / tally.steps:.1f} nodes in a step of {tally.requests / tally.steps:.1f} "
        f"requests, of {tally.drafted / tally.steps:.1f} drafted; "
        f"heads asked in {tally.asked / tally.steps:.0%} of steps"
    )
    return f"{found}; probability of nodes, expected and accepted: {pairs}" if pairs else found


@cache
def _families() -> tuple[dict[str, Counter], dict[str, Counter]]:
    """Return the process's counters by the attribute of ``Tally``; Prometheus refuses a name twice."""
    by_probability = (*LABELS, "probability")
    return (
        {
            "steps": Counter("medusa:budget_steps", "Steps of the engine in which requests could have drafts.", LABELS),
            "asked": Counter("medusa:budget_asked_steps", "Steps of the engine in which heads were asked.", LABELS),
            "requests": Counter("medusa:budget_requests", "Requests of these steps, added up.", LABELS),
            "drafted": Counter("medusa:budget_drafted_nodes", "Nodes that the heads drafted.", LABELS),
            "chosen": Counter("medusa:budget_chosen_nodes", "Nodes that the budget let through.", LABELS),
        },
        {
            "nodes": Counter(
                "medusa:predicted_nodes", "Verified nodes, by the probability expected of them.", by_probability
            ),
            "expected": Counter(
                "medusa:predicted_nodes_expected", "Nodes that were expected to be accepted.", by_probability
            ),
            "accepted": Counter(
                "medusa:predicted_nodes_accepted", "Nodes that were accepted, by what was expected.", by_probability
            ),
        },
    )
