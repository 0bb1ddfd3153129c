# SPDX-License-Identifier: Apache-2.0
"""The worker class for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu_worker import Worker

if TYPE_CHECKING:
    from vllm_medusa.runner.v2.model_runner import MedusaModelRunner


class MedusaGPUWorker(Worker):
    """vLLM's GPU worker with our adapter to its V2 model runner."""

    def _make_model_runner(self) -> MedusaModelRunner:
        """Construct the adapter, through the method that vLLM leaves to subclasses.

        Raises:
            ValueError: vLLM has chosen its V1 model runner, which Medusa serves on CPUs only.

        """
        if not self.use_v2_model_runner:
            raise ValueError(
                "speculative_config: method 'medusa' runs on vLLM's V2 model runner on GPUs, but this engine uses V1; "
                "unset VLLM_USE_V2_MODEL_RUNNER and drop what V2 does not support (vLLM's log names it)"
            )
        from vllm_medusa.runner.v2.model_runner import MedusaModelRunner

        return MedusaModelRunner(self.vllm_config, self.device)
