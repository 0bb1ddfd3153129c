"""The worker class for CPUs, which chooses the adapter to the model runner."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class MedusaCPUWorker(CPUWorker):
    """vLLM's CPU worker with our model runner."""

    def init_device(self) -> None:
        """Set the device up as the CPU worker does, then replace the runner.

        ``CPUWorker.init_device`` builds its runner by the class's name and has no method for it to override; the one it
        built holds no weights and no cache yet.
        """
        if self.use_v2_model_runner:
            from vllm_medusa.runner.v2.cpu_model_runner import MedusaModelRunner
        else:
            from vllm_medusa.runner.v1.model_runner import MedusaModelRunner

            # V1 builds its proposer from a closed list of methods, in which this one is open to all.
            self.vllm_config.speculative_config.method = "custom_class"
        super().init_device()
        self.model_runner = MedusaModelRunner(self.vllm_config, self.device)
