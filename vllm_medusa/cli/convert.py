# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vllm_medusa.cli.errors import one_line_errors

if TYPE_CHECKING:
    from vllm_medusa.checkpoint.conversion import Conversion


def convert(
    source: Annotated[str, typer.Argument(help="The heads' directory, or their repository on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet, or be empty.")],
    to: Annotated[
        Literal["served", "original"],
        typer.Option(help="served: what vLLM 0.32 and this plugin read. original: medusa_lm_head.pt and its config."),
    ] = "served",
    target: Annotated[
        str | None,
        typer.Option(help="The heads' target: sizes are checked against it, and heads without LM heads get its."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the target's repository.")
    ] = False,
) -> None:
    """Convert published heads to the layout of vLLM, or back.

    A Medusa-2 checkpoint, a whole model with heads in it, is split into OUTPUT/heads and OUTPUT/target.
    """
    with one_line_errors():
        from vllm_medusa.checkpoint.conversion import Layout
        from vllm_medusa.checkpoint.conversion import convert as convert_checkpoint
        from vllm_medusa.checkpoint.hub import local_directory
        from vllm_medusa.progress import progress

        with progress("Converting"):
            done = convert_checkpoint(
                local_directory(source),
                output,
                Layout(to),
                target=None if target is None else local_directory(target),
                base_model=target,
                trust_remote_code=trust_remote_code,
            )
    typer.echo(_describe(done))
    if to == "served":
        serve = json.dumps({"method": "medusa", "model": str(done.heads)})
        typer.echo(f"vllm serve {done.target or target or 'TARGET'} --speculative-config '{serve}'")


def _describe(done: Conversion) -> str:
    spec = done.spec
    layers = "one residual layer" if spec.num_layers == 1 else f"{spec.num_layers} residual layers"
    heads = (
        f"{done.heads}: {spec.num_heads} heads of {layers}, {'shared' if spec.shared_lm_head else 'own'} LM heads, "
        f"hidden size {spec.hidden_size}, {spec.vocab_size} tokens, {str(done.dtype).removeprefix('torch.')}"
    )
    return heads if done.target is None else f"{done.target}: the model without its heads\n{heads}"
