# SPDX-License-Identifier: Apache-2.0
"""``vllm-medusa distill``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.cli.options import settings_of, with_options_of
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.data.validation import validated
from vllm_medusa.distillation.dialogue import PromptStyle, Target
from vllm_medusa.distillation.run import DistillConfig
from vllm_medusa.distillation.self_prompts import SelfPromptConfig, SelfPrompts
from vllm_medusa.files import parse_json
from vllm_medusa.messages import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@with_options_of(DistillConfig, SelfPromptConfig)
def distill(
    settings: dict[str, Any],
    output: Annotated[Path, typer.Option(help="The directory to write; new, empty, or of an interrupted run.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of prompts: .jsonl or .json of conversations or prompts, .txt with one prompt per line."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Use an OpenAI-compatible server, http://HOST:PORT/v1, instead of vLLM in this process."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --url: dialogues that run at the same time.")] = 64,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="With --url and --self-prompts: where the model's tokenizer is. Default: the model."),
    ] = None,
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
    """Let the target write the training set for its heads.

    The target answers prompts, and "train --data OUTPUT" learns from its answers. Of conversations the user's turns are
    kept, and the target answers each one, with its own earlier answers in context. Without prompts, a chat model writes
    the users' turns too: --self-prompts N. The same command resumes an interrupted run after its last finished file.
    """
    with one_line_errors():
        from vllm_medusa.data.chat import user_turn
        from vllm_medusa.distillation.run import distill as run_distillation

        config = validated(DistillConfig, settings_of(DistillConfig, settings))
        own_prompts = _self_prompt_config(settings_of(SelfPromptConfig, settings), prompts or [], config)
        target: Target
        loaded: PreTrainedTokenizerBase | None = None
        if url is not None:
            from vllm_medusa.distillation.served_target import ServedTarget

            target = ServedTarget(url, config.model, concurrency)
            style = PromptStyle.CHAT
            if own_prompts is not None:
                loaded = _load_tokenizer(tokenizer or config.model, {}, "; give its directory as --tokenizer")
        else:
            options = _engine_options(engine_args)

            from vllm_medusa.distillation.offline_target import OfflineTarget

            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # More would interrupt the progress bar.
            loaded = _load_tokenizer(config.model, options)
            target = OfflineTarget(config.model, loaded, options)
            style = PromptStyle.CHAT if loaded.chat_template else PromptStyle.COMPLETION
        config = config.model_copy(update={"style": config.style or style})
        self_prompts = None
        if own_prompts is not None:
            assert loaded is not None
            self_prompts = SelfPrompts(own_prompts, user_turn(loaded))
        counter = BadLineCounter(BadLines.from_flag(skip_bad))
        manifest = run_distillation(prompts or [], output, config, target, counter, sys.argv, self_prompts=self_prompts)
    counter.report()
    assert manifest.counts is not None
    counts = manifest.counts
    typer.echo(
        f"{output}: {counts.records} records of {counts.prompts} prompts, {counts.tokens} tokens, "
        f"in {len(manifest.shards)} files"
    )


def _self_prompt_config(
    settings: dict[str, Any], prompts: Sequence[Path], config: DistillConfig
) -> SelfPromptConfig | None:
    """Return the settings of own prompts, None if files are given; raise ``ValueError`` if it is both or neither."""
    if "self_prompts" not in settings:
        if settings:
            option = next(iter(settings)).replace("_", "-")
            raise ValueError(f"{option} is about the target's own prompts; give --self-prompts N with it")
        if not prompts:
            raise ValueError("there are no prompts: give files, or --self-prompts N")
        return None
    if prompts:
        raise ValueError(f"both {prompts[0]} and --self-prompts are given; give one of them")
    if config.style is PromptStyle.COMPLETION:
        raise ValueError("self-prompts are a chat model's user turns; give style chat, or files of prompts")
    return validated(SelfPromptConfig, settings)


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


def _load_tokenizer(model: str, options: dict[str, Any], advice: str = "") -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = options.get("tokenizer") or model
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=options.get("tokenizer_revision") or options.get("revision"),
            trust_remote_code=options.get("trust_remote_code", False),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name!r} has no tokenizer that can be loaded: {error}{advice}") from None
