# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_medusa.cli``."""

from vllm_medusa.cli import app

app()
