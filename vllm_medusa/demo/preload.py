# SPDX-License-Identifier: Apache-2.0
"""Slow imports of an engine's process, done once in the process from which contenders are forked."""

import logging
import signal
from importlib import import_module

# Ctrl-C goes to all processes of the terminal; the one that started this process ends it, and those forked from it.
signal.signal(signal.SIGINT, signal.SIG_IGN)

# That process has no log file: vLLM's messages on import would interrupt the progress bars.
logging.getLogger("vllm").addHandler(logging.NullHandler())
for module in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"):
    import_module(module)
