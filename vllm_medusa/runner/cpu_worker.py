# SPDX-License-Identifier: Apache-2.0
"""The worker class for CPUs, which chooses the adapter to the model runner."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_medusa.compat.runners import cpu_runner


class MedusaCPUWorker(CPUWorker):
    """vLLM's CPU worker with our model runner."""

    def init_device(self) -> None:
        """Set the device up as the CPU worker does, with our runner in the place of vLLM's."""
        if self.use_v2_model_runner:
            from vllm_medusa.runner.v2.cpu_model_runner import MedusaModelRunner
        else:
            from vllm_medusa.runner.v1.model_runner import MedusaModelRunner

            # V1 builds its proposer from a closed list of methods; "custom_class" is the entry that takes any class.
            self.vllm_config.speculative_config.method = "custom_class"
        with cpu_runner(MedusaModelRunner, v2=self.use_v2_model_runner):
            super().init_device()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Let the budget learn what steps cost, before vLLM resets the random state and serves."""
        if not self.use_v2_model_runner:
            self.model_runner.learn_costs()
        return super().compile_or_warm_up_model()
