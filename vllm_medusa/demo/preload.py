# SPDX-License-Identifier: Apache-2.0
"""Slow imports of an engine's process, done once in the process from which contenders are forked."""

import logging
import signal
from importlib import import_module

from tqdm import tqdm

# Ctrl-C reaches this process and those forked from it too; they end at once, and the first one says so in its line.
signal.signal(signal.SIGINT, signal.SIG_DFL)

# That process has no log file: vLLM's messages on import would interrupt the progress bars.
logging.getLogger("vllm").addHandler(logging.NullHandler())
for module in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"):
    import_module(module)

# tqdm makes its lock with the first bar. Made here, all share it; a contender that is ended would leave its own behind.
tqdm.get_lock()
