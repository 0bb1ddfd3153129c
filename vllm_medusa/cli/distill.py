# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa distill``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.cli.options import with_options_of
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.distillation.dialogue import PromptStyle, Target
from vllm_medusa.distillation.run import DistillConfig
from vllm_medusa.files import parse_json
from vllm_medusa.messages import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@with_options_of(DistillConfig)
def distill(
    settings: dict[str, Any],
    prompts: Annotated[
        list[Path],
        typer.Argument(
            help="Files of prompts: .jsonl or .json of conversations or prompts, .txt with one prompt per line."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The directory to write; new, empty, or of an interrupted run.")],
    url: Annotated[
        str | None,
        typer.Option(help="Use an OpenAI-compatible server, http://HOST:PORT/v1, instead of vLLM in this process."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --url: dialogues that run at the same time.")] = 64,
    engine_args: Annotated[
        str, typer.Option(help="Without --url: further options of vllm.LLM, as a JSON object.")
    ] = "{}",
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Skip and count lines without a valid prompt, and prompts that the target refuses.",
        ),
    ] = False,
) -> None:
    """Let the target write the training set for its heads: its own answers to prompts, for "train --data OUTPUT".

    Of conversations the user's turns are kept, and the target answers each one, with its own earlier answers in
    context. The same command resumes an interrupted run after its last finished file.
    """
    with one_line_errors():
        from vllm_medusa.data.validation import validated
        from vllm_medusa.distillation.run import distill as run_distillation

        config = validated(DistillConfig, settings)
        target: Target
        if url is not None:
            from vllm_medusa.distillation.served_target import ServedTarget

            target = ServedTarget(url, config.model, concurrency)
            style = PromptStyle.CHAT
        else:
            options = _engine_options(engine_args)

            from vllm_medusa.distillation.offline_target import OfflineTarget

            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # More would interrupt the progress bar.
            tokenizer = _load_tokenizer(config.model, options)
            target = OfflineTarget(config.model, tokenizer, options)
            style = PromptStyle.CHAT if tokenizer.chat_template else PromptStyle.COMPLETION
        config = config.model_copy(update={"style": config.style or style})
        counter = BadLineCounter(BadLines.from_flag(skip_bad))
        manifest = run_distillation(prompts, output, config, target, counter, sys.argv)
    counter.report()
    assert manifest.counts is not None
    counts = manifest.counts
    typer.echo(
        f"{output}: {counts.records} records of {counts.prompts} prompts, {counts.tokens} tokens, "
        f"in {len(manifest.shards)} files"
    )


def _engine_options(text: str) -> dict[str, Any]:
    try:
        options = parse_json(text)
    except ValueError as error:
        raise ValueError(f"engine-args: {shortened(text)} is not JSON: {error}") from None
    if not isinstance(options, dict) or "model" in options:
        raise ValueError(
            'engine-args: must be a JSON object without "model", such as {"dtype": "float16"}, '
            f"got {shortened(options)}"
        )
    return options


def _load_tokenizer(model: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = options.get("tokenizer") or model
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=options.get("tokenizer_revision") or options.get("revision"),
            trust_remote_code=options.get("trust_remote_code", False),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name!r} has no tokenizer that can be loaded: {error}") from None
