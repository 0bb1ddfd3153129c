# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from packaging.version import Version
from vllm.config import SpeculativeConfig, speculative
from vllm.config import vllm as engine_config
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.registry import ModelRegistry
from vllm.sampling_params import SamplingParams

from vllm_medusa.checkpoint.config import ARCHITECTURE
from vllm_medusa.compat import version
from vllm_medusa.compat.names import ENGINE_METHOD
from vllm_medusa.plugin import register

WRAPPED: list[tuple[type, str]] = [
    (EngineArgs, "create_speculative_config"),
    (SamplingParams, "_validate_spec_decode"),
]


def wrapped() -> list[Any]:
    return [getattr(owner, name) for owner, name in WRAPPED]


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own functions, as they are before the plugin; ours are put back afterwards."""
    register()
    for owner, name in WRAPPED:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)


def test_importing_the_entry_point_imports_neither_vllm_nor_torch() -> None:
    code = "import vllm_medusa.plugin, sys; print(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_imports_neither_the_options_nor_the_heads_nor_the_worker() -> None:
    code = (
        "import vllm.engine.arg_utils, vllm_medusa.plugin, sys; vllm_medusa.plugin.register();"
        "print('found', sorted(name for name in sys.modules if name.startswith('vllm_medusa.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [found] = [line for line in done.stdout.splitlines() if line.startswith("found")]
    compat = ["compat", "compat.names", "compat.patches", "compat.version"]
    modules = ["checkpoint", "checkpoint.config", *compat, "plugin"]
    assert found == f"found {[f'vllm_medusa.{module}' for module in modules]}"


@pytest.mark.usefixtures("unregistered")
def test_registering_twice_is_registering_once() -> None:
    stock = wrapped()
    register()
    once = wrapped()
    register()
    assert wrapped() == once
    assert [function.__wrapped__ for function in once] == stock
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize("options", [None, {"method": "ngram", "num_speculative_tokens": 3}])
def test_an_engine_that_does_not_ask_for_medusa_gets_what_vllm_makes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any] | None
) -> None:
    seen = []

    def create(*args: Any) -> str:
        seen.append(args)
        return "vLLM's"

    monkeypatch.setattr(EngineArgs, "create_speculative_config", create)
    register()
    engine_args = EngineArgs(model=str(tmp_path), speculative_config=options)
    assert engine_args.create_speculative_config("model", "parallel") == "vLLM's"
    assert seen == [(engine_args, "model", "parallel")]
    assert engine_args.speculative_config == options


def test_asynchronous_scheduling_is_open_to_our_method_besides_those_of_vllm() -> None:
    register()
    assert get_args(engine_config.NgramGPUTypes) == (*get_args(speculative.NgramGPUTypes), ENGINE_METHOD)
    assert ENGINE_METHOD not in get_args(speculative.SpeculativeMethod)


def test_vllm_still_refuses_min_p_under_its_own_speculation() -> None:
    register()
    ngram = SpeculativeConfig(method="ngram", num_speculative_tokens=2)
    with pytest.raises(VLLMValidationError, match="min_p"):
        SamplingParams(min_p=0.5)._validate_spec_decode(ngram)


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "0.34.0rc1", "1.0"])
def test_an_unsupported_vllm_is_refused_naming_both_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: str
) -> None:
    monkeypatch.setattr(version, "vllm_version", lambda: Version(found))
    register()
    engine_args = EngineArgs(model=str(tmp_path), speculative_config={"method": "medusa", "model": "heads"})
    with pytest.raises(RuntimeError) as refused:
        engine_args.create_speculative_config(None, None)
    message = str(refused.value)
    assert f"vLLM {found} is installed" in message
    assert "vllm-medusa 0.1.0 supports vLLM >= 0.32, < 0.34" in message
    assert "\n" not in message


@pytest.mark.usefixtures("unregistered")
def test_an_unsupported_vllm_is_otherwise_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(version, "vllm_version", lambda: Version("0.34.0"))
    stock = wrapped()
    register()
    assert wrapped()[1:] == stock[1:]
    assert EngineArgs(model=str(tmp_path)).create_speculative_config(None, None) is None
