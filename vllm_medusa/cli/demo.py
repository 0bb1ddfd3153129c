# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa demo``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.demo.places import DIRECTORY, HEADS, MODEL, QUESTIONS, native_heads_of
from vllm_medusa.demo.process import share_environment, start_fork_server


def demo(
    directory: Annotated[Path, typer.Option(help="Where derived heads, logs and results are kept.")] = DIRECTORY,
    model: Annotated[Path, typer.Option(help="A chat model; the default one is fetched if it is missing.")] = MODEL,
    heads: Annotated[Path, typer.Option(help="Its heads.")] = HEADS,
    native_heads: Annotated[
        Path | None, typer.Option(help="Plain heads, for vLLM's own chain. Default: those beside the default heads.")
    ] = None,
    questions: Annotated[Path, typer.Option(help="Questions in Spec-Bench's format.")] = QUESTIONS,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each kind. Default: all.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="The most tokens of an answer. Default: 32, or 16 on CPUs without bf16 instructions."),
    ] = None,
) -> None:
    """Race stock vLLM against draft trees.

    A real chat model answers questions of several kinds: plain vLLM, vLLM's own chain and a small tree side by side; a
    wide tree shows how far fewer steps go.
    """
    with one_line_errors():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it once; long work has bars of our own.
        share_environment()
        start_fork_server()  # It imports vLLM while this process imports transformers.
        from vllm_medusa.demo.run import DemoSettings, run_demo

        run_demo(DemoSettings(directory, model, heads, native_heads_of(heads, native_heads), questions, limit, tokens))
