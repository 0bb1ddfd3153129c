# SPDX-License-Identifier: Apache-2.0
"""Targets whose repositories hold the code of their models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code_of_its_own(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a Llama's directory one that only its own code can load; transformers copies that code to beside it."""
    modules = target.parent / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    (target / "configuration_own.py").write_text(CONFIGURATION)
    (target / "modeling_own.py").write_text(MODELING)
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
