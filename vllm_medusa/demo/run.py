# SPDX-License-Identifier: Apache-2.0
"""The demo: find model, heads and questions, let the contenders race, report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from vllm_medusa.data.chat import encode_prompt
from vllm_medusa.data.records import Message, Role
from vllm_medusa.demo.contenders import CONTENDERS, TREE_WIDE, TREES, fastest_dtype, speculative_configs
from vllm_medusa.demo.display import shown
from vllm_medusa.demo.packaged_model import SMOLLM2, fetch
from vllm_medusa.demo.places import MODEL, require_shipped
from vllm_medusa.demo.questions import Question, read_questions
from vllm_medusa.demo.race import Race, first_of_each, run_race
from vllm_medusa.demo.report import draw, print_table, summarise, summarise_by_kind, write_results

WIDE_ANSWERS = 1
"""Questions of each kind that the wide tree answers: on a CPU its many rows take long."""

TOKENS = {"bfloat16": 32, "float32": 16}
"""The most tokens of an answer, by the engines' dtype, so that the demo ends within three minutes on two cores."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo decodes.

    Attributes:
        directory: where derived heads, logs and results are kept.
        model: a chat model's directory; the default one is fetched if it is missing.
        heads: its heads' directory.
        native_heads: the heads of vLLM's own chain, plain ones.
        questions: a file of questions (see ``read_questions``); their first turns are asked.
        limit: questions of each kind; None: all.
        tokens: most tokens of an answer; None: ``TOKENS``.

    """

    directory: Path
    model: Path
    heads: Path
    native_heads: Path
    questions: Path
    limit: int | None
    tokens: int | None


def run_demo(settings: DemoSettings) -> None:
    """Run the demo and print what it found; raises ``ValueError`` or ``OSError`` if something is missing or wrong."""
    console = Console()
    require_shipped(settings.questions, "--questions")
    require_shipped(settings.heads, "--heads")
    require_shipped(settings.native_heads, "--native-heads")
    require_model(settings.model, "--model")
    questions = read_questions(settings.questions, settings.limit)
    kinds = [question.category for question in questions]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    dtype = fastest_dtype()
    race = Race(
        target=settings.model,
        dtype=dtype,
        configs=speculative_configs(
            CONTENDERS, settings.model, settings.heads, settings.native_heads, settings.directory
        ),
        prompts=[encode_question(tokenizer, question) for question in questions],
        wide_asked=first_of_each(kinds, WIDE_ANSWERS),
        tokens=settings.tokens or TOKENS[dtype],
        stop=(tokenizer.eos_token_id,),
    )
    racing = [name for name in race.configs if name != TREE_WIDE]
    text_of = partial(tokenizer.decode, skip_special_tokens=True)
    runs = run_race(race, settings.directory / "logs", partial(shown, questions, racing, text_of, console))

    summary, by_kind = summarise(runs), summarise_by_kind(runs, kinds)
    details: dict[str, Any] = {
        "model": str(settings.model),
        "heads": str(settings.heads),
        "native_heads": str(settings.native_heads),
        "questions": str(settings.questions),
        "tokens": race.tokens,
        "trees": TREES,
        "timed_dtype": race.dtype,
        "threads": race.threads,
        "runs": summary,
        "by_kind": by_kind,
    }
    results, plot = (settings.directory / name for name in ("results.json", "results.png"))
    write_results(results, details)
    print_table(summary, by_kind, console)
    note = (
        f"{settings.model.name} with {settings.heads.name}, {len(questions)} questions, at most {race.tokens} "
        f"tokens each, {race.dtype}, {race.threads} CPU threads"
    )
    console.print(f"{note}; the wide tree answers {len(race.wide_asked)} of them.", highlight=False)
    draw(plot, summary, by_kind, note)
    console.print(f"Written: {results}, {plot}", highlight=False)


def require_model(model: Path, option: str) -> None:
    """Fetch the default model if it is missing; raise ``ValueError`` if another one is."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # The bars of loading and saving would interrupt ours.
    if model == MODEL:
        fetch(SMOLLM2, model)
    elif not (model / "config.json").is_file():
        raise ValueError(f"{option}: {model} holds no model; give a chat model's directory, or leave it out")


def encode_question(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """Return the token ids of a question's first turn, ready for the answer."""
    return encode_prompt(tokenizer, [Message(role=Role.USER, content=question.turns[0])])
