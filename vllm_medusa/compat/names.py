# SPDX-License-Identifier: Apache-2.0
"""Names that vLLM and the plugin know each other by."""

from __future__ import annotations

from typing import Final

METHOD: Final = "medusa"
"""The value of ``method`` in ``--speculative-config`` that asks for this plugin."""

ENGINE_METHOD: Final = "vllm_medusa"
"""The engine-internal method name.

vLLM compares ``method`` with its own names in many places; a name it does not know avoids all of those branches.
"""

PROPOSER: Final = "vllm_medusa.runner.proposer.MedusaProposer"
"""The path of the proposer's class. As ``model`` of the speculative config it is where the V1 runner looks."""

WORKERS: Final = {
    "cpu": "vllm_medusa.runner.cpu_worker.MedusaCPUWorker",
    "cuda": "vllm_medusa.runner.gpu_worker.MedusaGPUWorker",
}
"""The path of the worker's class for each platform (``current_platform.device_type``)."""

HEADS = "vllm_medusa.model.heads:MedusaHeads"
"""The path of the heads' class, as vLLM's model registry takes it."""
