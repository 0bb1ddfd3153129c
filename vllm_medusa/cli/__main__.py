"""``python -m vllm_medusa.cli``."""

from vllm_medusa.cli import app

app()
