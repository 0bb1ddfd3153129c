# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.cli.options import with_options_of
from vllm_medusa.training.config import TrainConfig, load_config


@with_options_of(TrainConfig)
def train(
    settings: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file of settings, named as the options with _ for -; options take precedence."),
    ] = None,
) -> None:
    """Train heads (medusa1), or heads and target (medusa2).

    The same command resumes an interrupted run from its last checkpoint.

    For several GPUs start it with "torchrun --nproc-per-node N -m vllm_medusa.cli train ..." or "accelerate launch".
    """
    with one_line_errors():
        resolved = load_config(config, settings)

        import json

        from rich.console import Console
        from transformers.utils import logging

        from vllm_medusa.training.run import run_training

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        result = run_training(resolved, sys.argv)
    if result is not None:
        result.print(Console())
        serve = json.dumps({"method": "medusa", "model": str(result.heads)})
        typer.echo(f"vllm serve {result.target or resolved.target} --speculative-config '{serve}'")
