# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample import logits_processor
from vllm.v1.worker import cpu_worker, gpu_model_runner
from vllm.v1.worker.cpu import model_runner as v2_cpu_model_runner
from vllm.v1.worker.gpu import model_runner as v2_model_runner
from vllm.v1.worker.gpu.spec_decode import adaptive_verification as owner

from tests.patched import changes, standing
from vllm_medusa.compat.runners import adaptive_verification, all_logits_processors, cpu_runner, speculator

CPU = torch.device("cpu")


class Runner:
    pass


PATCHES: dict[str, tuple[Callable[[], AbstractContextManager[None]], ModuleType, str]] = {
    "all_logits_processors": (all_logits_processors, gpu_model_runner, "build_logitsprocs"),
    "speculator": (lambda: speculator(lambda config, device, states: None), v2_model_runner, "init_speculator"),
    "adaptive_verification": (
        lambda: adaptive_verification(Runner, lambda error: None),
        v2_model_runner,
        "maybe_create_adaptive_verification_manager",
    ),
    "cpu_runner of V1": (lambda: cpu_runner(Runner, v2=False), cpu_worker, "CPUModelRunner"),
    "cpu_runner of V2": (lambda: cpu_runner(Runner, v2=True), v2_cpu_model_runner, "CPUModelRunner"),
}


def foreign(*args: Any) -> None:
    """Somebody else's patch."""


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_ends_with_its_context(patch: str) -> None:
    context, module, name = PATCHES[patch]
    before = standing("runner")
    with context():
        assert changes(before) == [f"{module.__name__}:{name}"]
    assert changes(before) == []


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_that_stood_before_ours_is_restored(patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, module, name = PATCHES[patch]
    monkeypatch.setattr(module, name, foreign)
    with context():
        assert getattr(module, name) is not foreign
    assert getattr(module, name) is foreign


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_ends_when_the_constructor_fails(patch: str) -> None:
    context, _, _ = PATCHES[patch]
    before = standing("runner")
    with pytest.raises(RuntimeError, match="no memory"), context():
        raise RuntimeError("no memory")
    assert changes(before) == []


def test_logits_processors_are_built_as_without_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_model_runner, "build_logitsprocs", lambda *args: seen.append(args) or "built")
    config = SimpleNamespace(speculative_config="medusa", model_config="target")
    with all_logits_processors():
        assert gpu_model_runner.build_logitsprocs(config, CPU, False, False, ["mine"]) == "built"
    [(given, *others)] = seen
    assert (given.speculative_config, given.model_config) == (None, "target")
    assert others == [CPU, False, False, ["mine"]]
    assert config.speculative_config == "medusa"


def test_the_speculator_is_made_from_what_vllm_s_is_made_from() -> None:
    with speculator(lambda *args: ("made of", *args)):
        assert v2_model_runner.init_speculator("config", CPU, "states") == ("made of", "config", CPU, "states")


def test_the_manager_is_made_by_ours_and_one_that_cannot_be_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*, asked: str) -> Any:
        if asked == "unsupported":
            raise ValueError("FLEX_ATTENTION allows none. Pass enable_adaptive_verification=false in the config.")
        return owner.AdaptiveVerificationManager(asked) if asked != "none" else None

    def ours(asked: str) -> str:
        if asked == "broken":
            raise ValueError("wrong")
        return f"ours: {asked}"

    monkeypatch.setattr(v2_model_runner, "maybe_create_adaptive_verification_manager", create)
    refused: list[str] = []
    stock = owner.AdaptiveVerificationManager
    with adaptive_verification(ours, refused.append):
        make = v2_model_runner.maybe_create_adaptive_verification_manager
        assert make(asked="all") == "ours: all"
        assert make(asked="none") is None
        assert make(asked="unsupported") is None
        with pytest.raises(ValueError, match="wrong"):
            make(asked="broken")
        assert owner.AdaptiveVerificationManager is stock
    assert refused == ["FLEX_ATTENTION allows none"]


@pytest.mark.parametrize(
    ("asked", "unserved", "reason"),
    [
        ("get_query_lens_mismatch_unsupported_backend", "FLEX", "the FLEX attention backend does not support"),
        ("get_varlen_cudagraph_unsupported_backend", ("FLEX", None), "but FLEX allows none"),
    ],
)
def test_of_what_vllm_says_about_a_backend_the_reason_is_kept_without_its_advice(
    monkeypatch: pytest.MonkeyPatch, asked: str, unserved: Any, reason: str
) -> None:
    for function in ("get_query_lens_mismatch_unsupported_backend", "get_varlen_cudagraph_unsupported_backend"):
        monkeypatch.setattr(owner, function, lambda *args, **kwargs: None)
    monkeypatch.setattr(owner, asked, lambda *args, **kwargs: unserved)
    refused: list[str] = []
    with adaptive_verification(Runner, refused.append):
        made = v2_model_runner.maybe_create_adaptive_verification_manager(
            enable_adaptive_verification=True,
            attn_groups=[],
            req_states=SimpleNamespace(num_speculative_steps=3),
            query_start_loc=torch.zeros(1),
            num_bonus_tokens=1,
            max_total_logits=1,
            vllm_config=SimpleNamespace(),
        )
    assert made is None
    [said] = refused
    assert said.startswith("Adaptive verification ")
    assert said.endswith(reason)


def test_what_stands_without_an_engine_is_of_vllm() -> None:
    assert gpu_model_runner.build_logitsprocs is logits_processor.build_logitsprocs
    assert v2_model_runner.init_speculator.__module__ == "vllm.v1.worker.gpu.spec_decode"
    assert cpu_worker.CPUModelRunner.__module__ == "vllm.v1.worker.cpu_model_runner"
    assert v2_cpu_model_runner.CPUModelRunner.__module__ == "vllm.v1.worker.cpu.model_runner"
