# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_medusa.cli.errors import one_line_errors


def demo(
    directory: Annotated[Path, typer.Option(help="Where models and results are kept.")] = Path("build/demo"),
    rounds: Annotated[int, typer.Option(min=1, help="Prompts that each contender decodes for time.")] = 5,
) -> None:
    """Race stock vLLM against draft trees on a small model.

    The model and its heads are trained on this machine first, once; a second run starts with the race.
    """
    with one_line_errors():
        from vllm_medusa.demo.run import run_demo

        run_demo(directory, rounds)
