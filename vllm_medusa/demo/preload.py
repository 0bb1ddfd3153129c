"""Imported once, by the process that contenders are forked from: what takes an engine's process long to import."""

import logging
from importlib import import_module

# That process has no log of its own: what vLLM says on import would cut through the progress bars.
logging.getLogger("vllm").addHandler(logging.NullHandler())
for module in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"):
    import_module(module)
