"""The worker class for CPUs, which chooses the adapter to the model runner."""

from __future__ import annotations

from importlib import import_module

from vllm.v1.worker.cpu_worker import CPUWorker


class MedusaCPUWorker(CPUWorker):
    """vLLM's CPU worker with our model runner."""

    def init_device(self) -> None:
        """Set the device up as the CPU worker does, then replace the runner.

        ``CPUWorker.init_device`` builds its runner by the class's name and has no method for it to override; the one it
        built holds no weights and no cache yet.
        """
        adapter = import_module(f"vllm_medusa.runner.{'v2_cpu' if self.use_v2_model_runner else 'v1'}")
        if not self.use_v2_model_runner:
            # V1 builds its proposer from a closed list of methods, in which this one is open to all.
            self.vllm_config.speculative_config.method = "custom_class"
        super().init_device()
        self.model_runner = adapter.MedusaModelRunner(self.vllm_config, self.device)
