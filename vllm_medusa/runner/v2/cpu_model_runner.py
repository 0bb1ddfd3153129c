# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's V2 model runner on CPUs, where a Triton backend for them is installed."""

from __future__ import annotations

from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from vllm_medusa.attention.cpu import backend
from vllm_medusa.kv_cache.backend_commit import BackendCommit
from vllm_medusa.runner.v2 import model_runner as v2


class MedusaModelRunner(v2.MedusaModelRunner, CPUModelRunner):
    """V2 with trees on a CPU, with the CPU's attention."""

    tree_attention_selected = staticmethod(backend.tree_attention_selected)
    commit_class = BackendCommit
