# SPDX-License-Identifier: Apache-2.0
"""The engine's log."""

from __future__ import annotations

from vllm.logger import init_logger

# vLLM's handlers are those of loggers below "vllm".
logger = init_logger("vllm.medusa")
