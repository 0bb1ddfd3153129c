# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig

from tests.unit.engine_configs import Models
from tests.unit.refusals.options import MROPE, RSWA
from vllm_medusa.config import medusa_config
from vllm_medusa.engine_checks import check_engine


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def checked(config: VllmConfig) -> None:
    options = medusa_config(config)
    assert options is not None
    check_engine(config, options.tree)


def test_another_platform_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_medusa.engine_checks.current_platform", SimpleNamespace(device_type="tpu"))
    assert "method 'medusa' runs on ['cpu', 'cuda'], not on 'tpu'" in models.refusal({})


def test_a_gpu_takes_a_branching_tree_with_an_fp8_cache(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.configure({"medusa_tree": [2]}, kv_cache_dtype="fp8")
    monkeypatch.setattr("vllm_medusa.engine_checks.current_platform", SimpleNamespace(device_type="cuda"))
    checked(config)
    for dtype in ("int8_per_token_head", "fp8_e5m2"):
        config.cache_config.cache_dtype = dtype
        with pytest.raises(ValueError, match=f"quantised KV cache .*{dtype}"):
            checked(config)


@pytest.mark.parametrize("target", [MROPE, RSWA], ids=["mrope", "rswa"])
def test_a_target_whose_trees_cannot_branch_is_served_with_a_chain(models: Models, target: dict[str, Any]) -> None:
    assert models.medusa({"medusa_tree": "chain"}, target=target).tree.topology.is_chain


def test_a_quantised_cache_takes_a_chain_and_no_branching_tree(models: Models) -> None:
    branching = models.configure({"medusa_tree": [2]}, kv_cache_dtype="fp8")
    said = r"^medusa_tree: [^\n]*quantised KV cache \(kv_cache_dtype 'fp8[^\n]*or give medusa_tree"
    with pytest.raises(ValueError, match=said):
        checked(branching)
    checked(models.configure({"medusa_tree": "chain"}, kv_cache_dtype="fp8"))
    checked(models.configure({"medusa_tree": [2]}))


def test_adapters_are_refused_whatever_the_tree(models: Models) -> None:
    with pytest.raises(ValueError, match=r"does not support LoRA adapters \(enable_lora\)"):
        checked(models.configure({"medusa_tree": "chain"}, enable_lora=True))
