# SPDX-License-Identifier: Apache-2.0
"""Engines in turns: plain decoding against a chain, a static tree and dynamic trees, by the number of requests.

With made-up weights hardly a draft is accepted, and what is measured is what a step costs: a tree gains as soon as it
emits more tokens per step than its step costs plain ones. With a target and heads that are given, tokens per step are
those of real text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from gpu_bench.engines import Decoded, Engine
from gpu_bench.launches import Launches
from gpu_bench.lines import Line
from gpu_bench.lineup import PROFILED_STEPS, Entered, Entrant, Part, Setting
from gpu_bench.timed import Timed, launch_lines, proposal_line
from gpu_bench.worker import Failed, Worker, started


def race_lines(setting: Setting, failed: Failed) -> Iterator[Line]:
    """Start engines, as many side by side as there is memory for, and let each take turns with plain decoding."""
    (plain, *others), size = setting.lineup.entrants, setting.at_a_time - 1
    with started([_start(setting, plain)], failed) as plain_workers:
        for first in range(0, len(others) if plain_workers else 0, size):
            group = {entrant.name: entrant for entrant in others[first : first + size]}
            if time.monotonic() > setting.deadline:
                failed(", ".join(group), TimeoutError("left out: the time that --minutes gives is over"))
                continue
            with started([_start(setting, entrant) for entrant in group.values()], failed) as workers:
                try:
                    entered = [Entered(group[worker.name], worker, worker.call("tree")) for worker in workers]
                    yield from _group_lines(setting, plain_workers[0], entered)
                except RuntimeError as error:
                    failed(", ".join(group), error)


def _start(setting: Setting, entrant: Entrant) -> Worker:
    rows = 1 if entrant.heads is None else 1 + entrant.tree.get("num_speculative_tokens", setting.lineup.num_heads)
    heads = None if entrant.heads is None else entrant.heads.directory
    plugins = {"VLLM_PLUGINS": "" if heads is None else "medusa"}
    return Worker(
        entrant.name, Engine, setting.lineup.directory, heads, entrant.tree, setting.engine_options(rows), **plugins
    )


def _group_lines(setting: Setting, plain: Worker, group: Sequence[Entered]) -> Iterator[Line]:
    for requests in setting.sizes.requests:
        taking_part = [each for each in group if setting.takes_part(each.entrant, requests)]
        if taking_part:
            yield from _race(setting, requests, plain, taking_part)
    for each in group:
        if Part.PROPOSAL in each.entrant.parts:
            yield from (proposal_line(setting, each, requests) for requests in setting.sizes.requests)


def _race(setting: Setting, requests: int, plain: Worker, group: Sequence[Entered]) -> Iterator[Line]:
    """Let engines decode the same prompts in turns."""
    sizes, workers = setting.sizes, [plain, *(each.worker for each in group)]
    for worker in workers:
        worker.call("begin", setting.lineup.prompts[:requests], sizes.most_tokens(setting.lineup.num_heads))
    rounds: list[list[Decoded]] = []
    while len(rounds) <= sizes.rounds and (len(rounds) < 2 or time.monotonic() < setting.deadline):
        rounds.append([worker.call("run", sizes.steps) for worker in workers])
    launches: dict[Entrant, Launches] = {
        each.entrant: each.worker.call("launches", PROFILED_STEPS)
        for each in group
        if Part.PROPOSAL in each.entrant.parts and setting.is_least(requests)
    }
    for worker in workers:
        worker.call("end")
    plain_rounds, *others = zip(*rounds[1:], strict=True)
    timed = [Timed(setting, requests, each, plain_rounds, own) for each, own in zip(group, others, strict=True)]
    racing = [each for each in timed if Part.RACE in each.entered.entrant.parts]
    if racing:
        yield racing[0].plain_line(", ".join(each.entered.entrant.name for each in racing))
    for each in timed:
        if Part.STEP in each.entered.entrant.parts and setting.is_least(requests):
            yield from each.step_lines()
        if each in racing:
            yield each.race_line()
    for entrant, found in launches.items():
        yield from launch_lines(setting, entrant, found)
