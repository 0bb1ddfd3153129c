# SPDX-License-Identifier: Apache-2.0
"""The patches that stand only while a model runner is constructed. Each puts back what stood there before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.states import RequestState

VLLM_ADVICE = ". Pass enable_adaptive_verification=false"
"""Where vLLM's reason ends and its advice begins, which is to change an option that the method does not have."""


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Give a name of a module another value in this context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def all_logits_processors() -> AbstractContextManager[None]:
    """Let a V1 runner with a speculative config have every logits processor, custom ones included."""
    from vllm.v1.worker import gpu_model_runner

    build = gpu_model_runner.build_logitsprocs

    # Reason: under speculation vLLM drops min_p and logit_bias and refuses custom processors, because its rejection
    # sampler cannot apply them. Medusa draws with vLLM's plain sampler, which can.
    def build_logitsprocs(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return build(plain, *args, **kwargs)

    return replaced(gpu_model_runner, "build_logitsprocs", build_logitsprocs)


def speculator(make: Callable[[VllmConfig, torch.device, RequestState], Any]) -> AbstractContextManager[None]:
    """Let a V2 runner take its speculator from ``make``, which takes what ``init_speculator`` takes."""
    from vllm.v1.worker.gpu import model_runner

    # Reason: init_speculator knows a closed list of methods.
    return replaced(model_runner, "init_speculator", make)


def adaptive_verification(make: Callable[..., Any], refused: Callable[[str], None]) -> AbstractContextManager[None]:
    """Let a V2 runner make its manager of adaptive verification with ``make``.

    Args:
        make: takes what vLLM's manager takes; what it raises ends the start.
        refused: is told why, if vLLM says that an attention backend cannot serve it; the runner then has none.

    """
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as owner

    create = model_runner.maybe_create_adaptive_verification_manager

    # Reason: the runner makes its manager in the midst of a long method, by a function that names the class, and a
    # backend that cannot serve it ends the start, where a budget that is not asked for by number is to be left out.
    def maybe_create_adaptive_verification_manager(**kwargs: Any) -> Any:
        with replaced(owner, "AdaptiveVerificationManager", partial(partial, make)):
            try:
                served = create(**kwargs)
            except ValueError as error:
                reason, _, _ = str(error).partition(VLLM_ADVICE)
                refused(reason)
                return None
        return served and served()

    return replaced(
        model_runner, "maybe_create_adaptive_verification_manager", maybe_create_adaptive_verification_manager
    )


def cpu_runner(runner: type, *, v2: bool) -> AbstractContextManager[None]:
    """Let the CPU worker construct this runner.

    Args:
        runner: the class that takes the place of vLLM's ``CPUModelRunner``.
        v2: whether the worker uses model runner V2.

    """
    if v2:
        from vllm.v1.worker.cpu import model_runner as owner
    else:
        from vllm.v1.worker import cpu_worker as owner

    # Reason: CPUWorker.init_device names the class and has no method for a subclass to override. Replacing the runner
    # afterwards is no way: under Medusa's config vLLM's own runner cannot be constructed without the patches above.
    return replaced(owner, "CPUModelRunner", runner)
