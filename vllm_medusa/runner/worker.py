"""The worker classes, which choose the adapter to the model runner."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_medusa.runner.v1 import MedusaModelRunner


class MedusaCPUWorker(CPUWorker):
    """vLLM's CPU worker with our model runner."""

    def init_device(self) -> None:
        """Set the device up as the CPU worker does, then replace the runner.

        ``CPUWorker.init_device`` builds its runner by the class's name and has no method for it to override; the one it
        built holds no weights and no cache yet.
        """
        super().init_device()
        self.model_runner = MedusaModelRunner(self.vllm_config, self.device)
