# SPDX-License-Identifier: Apache-2.0
"""Real engines in the test's own process, and ways to drive and to watch them."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.model_executor.models import registry
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput

from tests.under_test import UNDER_TEST

Prompt = Sequence[int]
Tree = str | list[int] | list[list[int]]

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "seed": 0,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
}
"""What ``engine`` gives to ``LLM`` unless the test says otherwise."""

_open_engines: list[LLM] = []


@contextmanager
def engine(
    model: str | Path, *, heads: str | Path | None = None, tree: Tree | None = None, **options: Any
) -> Iterator[LLM]:
    """Run an engine in this process; only one at a time, since an engine that closes takes the process groups along.

    Args:
        model: the target's directory.
        heads: the heads' directory; None gives stock vLLM without speculation.
        tree: ``medusa_tree``; None leaves it to the heads' checkpoint.
        options: further options of ``LLM``; ``speculative_config`` adds to the keys that ``heads`` and ``tree`` set.

    """
    assert not _open_engines, "another engine is open; close it first"
    speculative = dict(options.pop("speculative_config", None) or {})
    if heads is not None:
        speculative = {"method": "medusa", "model": str(heads), "medusa_budget": "off", **speculative}
        if tree is not None:
            speculative["medusa_tree"] = tree
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)  # Models this small gain nothing from more, and lose tenfold where cores are shared.
    with (
        _imports_frozen(),
        _models_inspected_here(),
        UNDER_TEST.medusa() if speculative else nullcontext({}) as further,
    ):
        llm = LLM(model=str(model), **(DEFAULTS | further | options), speculative_config=speculative or None)
        _open_engines.append(llm)
        try:
            yield llm
        finally:
            _open_engines.remove(llm)
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@contextmanager
def _imports_frozen() -> Iterator[None]:
    """Keep what has been imported out of the garbage collections that an engine makes.

    It makes a dozen, and each would look through a million objects for half a second. vLLM's own calls do nothing
    meanwhile: they would freeze the engine, which is to be collected once it is closed, or unfreeze the imports.
    """
    gc.freeze()
    with patch.object(gc, "freeze"), patch.object(gc, "unfreeze"):
        yield


@contextmanager
def _models_inspected_here() -> Iterator[None]:
    """Let vLLM look at a class of models in this process: it would start another, for the sake of CUDA, in 20 s."""
    with patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()):
        yield


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Return parameters that emit exactly ``max_tokens`` tokens, each the target's most probable one."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options)


def generate(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Run all requests at once, as many together as the engine takes."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return llm.generate(requests, params if isinstance(params, SamplingParams) else list(params), use_tqdm=False)


def generate_staggered(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    most: int = 16,
    seed: int = 0,
) -> list[RequestOutput]:
    """Run requests that join while others decode, so that prompts, trees and batches of 1 to ``most`` requests mix.

    The number of requests aimed at changes every few steps, at random but the same for a seed. Outputs are in the order
    of the prompts.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    waiting = deque(zip(range(len(prompts)), prompts, each, strict=True))
    rng = random.Random(seed)
    outputs: dict[int, RequestOutput] = {}
    aim, steps_left = 1, 4
    running = 0
    while waiting or running:
        if steps_left == 0:
            aim, steps_left = rng.choice([most, rng.randint(1, most)]), rng.randint(2, 40)
        steps_left -= 1
        joining = min(max(aim - running, int(running == 0)), rng.randint(1, 4), len(waiting))
        for _ in range(joining):
            index, prompt, sampling = waiting.popleft()
            sampling = sampling.clone()
            sampling.output_kind = RequestOutputKind.FINAL_ONLY
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, sampling)
        running += joining
        for output in llm.llm_engine.step():
            if output.finished:
                assert isinstance(output, RequestOutput)
                outputs[int(output.request_id)] = output
                running -= 1
    return [outputs[index] for index in range(len(prompts))]


def texts(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """Return the emitted token ids of every completion, request by request."""
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@dataclass(frozen=True)
class SpecCounters:
    """What an engine has counted since it started: steps of requests with a draft, drafted and accepted tokens."""

    drafts: int
    drafted: int
    accepted: int

    @property
    def acceptance_length(self) -> float:
        """Tokens per step of a request, the one after the accepted drafts included."""
        return 1 + self.accepted / self.drafts

    def __sub__(self, earlier: SpecCounters) -> SpecCounters:
        return SpecCounters(
            self.drafts - earlier.drafts, self.drafted - earlier.drafted, self.accepted - earlier.accepted
        )


def spec_counters(llm: LLM) -> SpecCounters:
    """Read vLLM's own counters of speculation; zeros for an engine that does not speculate."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return SpecCounters(
        drafts=int(found.get("vllm:spec_decode_num_drafts", 0)),
        drafted=int(found.get("vllm:spec_decode_num_draft_tokens", 0)),
        accepted=int(found.get("vllm:spec_decode_num_accepted_tokens", 0)),
    )


def model_runner(llm: LLM) -> Any:
    """Return the engine's model runner."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def recorded_steps(llm: LLM) -> Iterator[list[SchedulerOutput]]:
    """Collect what the scheduler decides for every step that runs in this context."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    steps: list[SchedulerOutput] = []
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> SchedulerOutput:
        steps.append(original(*args, **kwargs))
        return steps[-1]

    scheduler.schedule = schedule
    try:
        yield steps
    finally:
        del scheduler.schedule


def is_mixed(step: SchedulerOutput) -> bool:
    """Whether the step verifies a draft and computes a part of a prompt that ends before the prompt does."""
    chunks = (
        request.num_computed_tokens + step.num_scheduled_tokens[request.req_id] < len(request.prompt_token_ids or ())
        for request in step.scheduled_new_reqs
    )
    return bool(step.scheduled_spec_decode_tokens) and any(chunks)
