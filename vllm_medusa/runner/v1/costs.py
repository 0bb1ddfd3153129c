# SPDX-License-Identifier: Apache-2.0
"""What the steps of an engine take, measured as it starts on vLLM's own dummy runs.

The clock is processor time by threads: threads that wait for each other spin, so that it is what a run takes where
nothing else runs, and other processes, which may be busy just then, hardly change it. The times of real steps, by which
the budget corrects these, do say how busy the machine is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_medusa.attention.cpu.build import cpu_description
from vllm_medusa.budget.cost import Curve
from vllm_medusa.budget.store import Costs, costs_directory, costs_file, name_of
from vllm_medusa.compat.log import logger
from vllm_medusa.files import WriteError
from vllm_medusa.runner.proposer import MedusaProposer
from vllm_medusa.runner.start_log import describe
from vllm_medusa.versions import installed_versions

TEXT_LENGTH = 512
"""Tokens of a request's text in which paths are looked up while that is measured."""

MOST_ROUNDS = 10
"""Each size is measured at most so often again, in turns."""

LONG_RUN, SIZES_AT_LEAST = 0.25, 8
"""Seconds of a run after which no larger size is measured, but so many sizes are. Beyond, time grows with the size: the
cores are busy."""

ENOUGH = 8.0
"""Seconds of all rounds after which there is no further one; but there is one more after the first."""


def known_costs(runner: CPUModelRunner, proposer: MedusaProposer, max_rows: int, max_num_reqs: int) -> Costs:
    """Return an engine's costs: as they were measured on this machine before, or measured now, on all ranks at once.

    Rank 0's costs are everybody's. A file that cannot be read is as none, and one that cannot be written is not missed.

    Args:
        runner: has the target's weights and KV cache.
        proposer: has the heads' weights.
        max_rows: rows of the largest step.
        max_num_reqs: requests of the largest step.

    """
    group, config = get_tp_group(), runner.vllm_config
    parts = _parts(config, proposer, max_rows, max_num_reqs)
    path = costs_file(costs_directory(envs.VLLM_CACHE_ROOT), parts)
    found = Costs.read(path) if group.rank_in_group == 0 else None
    if (known := group.broadcast_object(found)) is not None:
        return known
    start = time.perf_counter()
    measured = _measure(runner, proposer, max_rows, max_num_reqs)
    costs = group.broadcast_object(measured.model_copy(update={"engine": parts}))
    if group.rank_in_group == 0:
        logger.info(
            "Medusa: measured in %.1f s, ms of a step by rows: %s; of a proposal by requests: %s; kept in %s",
            time.perf_counter() - start,
            _in_words(costs.verification),
            _in_words(costs.proposal),
            path,
        )
        try:
            costs.write(path)
        except WriteError as error:
            logger.warning("Medusa: what steps cost is measured again at the next start: %s", error)
    return costs


@torch.inference_mode()
def _measure(runner: CPUModelRunner, proposer: MedusaProposer, max_rows: int, max_num_reqs: int) -> Costs:
    """Measure the target without attention and without the host's work, which serving adds, and the heads."""
    hidden_size = proposer.options.target_model_config.get_hidden_size()

    def verify(rows: int) -> None:
        hidden, _ = runner._dummy_run(rows, is_profile=True, skip_eplb=True)
        logits = runner.model.compute_logits(hidden[:rows])
        if logits is not None:
            logits.argmax(dim=-1)

    def propose(num_reqs: int) -> None:
        hidden = torch.zeros(num_reqs, hidden_size, dtype=runner.dtype)
        text = torch.zeros(num_reqs, TEXT_LENGTH, dtype=torch.int32) if proposer.looks_up else None
        proposer.propose(hidden, torch.zeros(num_reqs, dtype=torch.int64), text)

    return Costs(verification=_curve(verify, max_rows), proposal=_curve(propose, max_num_reqs))


def _curve(run: Callable[[int], None], most: int) -> Curve:
    """Measure what a run of each size takes; rank 0's clock says how much is measured, since all ranks run together."""
    agreed = get_tp_group().broadcast_object
    sizes: list[int] = []
    first: list[float] = []
    for size in _sizes(most):
        run(size)  # The first run of a size is slower: kernels choose their way and memory is new.
        sizes.append(size)
        first.append(agreed(_timed(run, size)))
        if first[-1] > LONG_RUN and len(sizes) >= SIZES_AT_LEAST:
            break
    rounds = min(max(int(ENOUGH / sum(first)), 1), MOST_ROUNDS)
    times = [first, *([_timed(run, size) for size in sizes] for _ in range(rounds))]
    return Curve.of_rounds(sizes, np.array(times))


def _sizes(most: int) -> list[int]:
    """Return the sizes to measure, two an octave."""
    sizes = sorted({size for octave in range(most.bit_length()) for size in (1 << octave, 3 << octave >> 1)})
    return [size for size in sizes if size <= most]


def _timed(run: Callable[[int], None], size: int) -> float:
    start = time.process_time()
    run(size)
    return (time.process_time() - start) / torch.get_num_threads()


def _parts(config: VllmConfig, proposer: MedusaProposer, max_rows: int, max_num_reqs: int) -> dict[str, str]:
    """Return all on which the times depend, and up to which sizes they were measured."""
    target, heads = config.model_config, proposer.options.draft_model_config
    return {
        "sizes": f"{max_rows} rows, {max_num_reqs} requests",
        "cpu": cpu_description(),
        "threads": str(torch.get_num_threads()),
        "ranks": str(config.parallel_config.tensor_parallel_size),
        "compilation": str(config.compilation_config.mode),
        "versions": str(installed_versions()),
        "target": name_of(target.model),
        "target's options": target.compute_hash(),
        "dtype": str(target.dtype),
        "heads": name_of(heads.model),
        "heads' options": heads.compute_hash(),
        "tree": describe(proposer.tree),
        "lookup": str(proposer.looks_up),
    }


def _in_words(curve: Curve) -> str:
    return " ".join(f"{size}:{seconds * 1e3:.1f}" for size, seconds in zip(curve.sizes, curve.seconds, strict=True))
