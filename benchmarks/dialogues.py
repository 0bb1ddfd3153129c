# SPDX-License-Identifier: Apache-2.0
"""Engines that answer conversations: questions of several turns, with the engine's own answers in between."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.demo.contenders import plugins
from vllm_medusa.demo.engine import Engine, acceptance_length, counters
from vllm_medusa.demo.process import Contender
from vllm_medusa.demo.questions import Question
from vllm_medusa.demo.report import machine

KV_CACHE_BYTES = 1 << 30
LOGS = Path("build/spec_bench")


@dataclass(frozen=True)
class Batch:
    """Questions of one category that are answered at the same time, and the most tokens of an answer."""

    questions: tuple[Question, ...]
    tokens: int


@dataclass(frozen=True)
class Answers:
    """What an engine made of a batch.

    Attributes:
        tokens: the token ids of each answer, ``[questions][turns]``.
        seconds: from the questions to the last answer, prompts included.
        steps: number of steps behind each answer's first token, by vLLM's counter.
        accepted: number of accepted tokens, by vLLM's counter.

    """

    tokens: list[list[list[int]]]
    seconds: float
    steps: int
    accepted: int


def batches(questions: Sequence[Question], size: int, tokens: int) -> Iterable[Batch]:
    """Cut the questions, which are sorted by category, into batches of one category each."""
    for _, group in groupby(questions, attrgetter("category")):
        each = tuple(group)
        for start in range(0, len(each), size):
            yield Batch(each[start : start + size], tokens)


def engine_of(target: Path, dtype: str, max_model_len: int, max_num_seqs: int) -> Engine:
    """Return an engine without speculation that takes conversations."""
    return Engine(
        str(target),
        dtype,
        None,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        skip_tokenizer_init=False,
    )


def contender(name: str, engine: Engine) -> Contender:
    """Return the process of an engine; its first answer is that it has started."""
    threads = machine()["cores"]  # Only one engine works at a time.
    return Contender(name, serve, (engine, threads), plugins(name), LOGS / f"{name}.log")


def ask_all(name: str, engine: Engine, batches: Sequence[Batch]) -> list[Answers]:
    """Start an engine, let it answer all batches, and end it."""
    with contender(name, engine) as started:
        started.answer()
        return [started.ask(batch) for batch in batches]


def serve(connection: Connection, engine: Engine, threads: int) -> None:
    """Be a contender: send ``None`` after the start, then an ``Answers`` for each ``Batch``."""
    from vllm import SamplingParams

    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm = engine.open()
    connection.send(None)
    while True:
        batch: Batch = connection.recv()
        connection.send(answer(llm, batch, SamplingParams(temperature=0, max_tokens=batch.tokens)))


def answer(llm: Any, batch: Batch, params: Any) -> Answers:
    """Answer a batch's questions, turn by turn; questions with fewer turns leave early."""
    before, start = counters(llm), time.perf_counter()
    dialogues: list[list[dict[str, str]]] = [[] for _ in batch.questions]
    tokens: list[list[list[int]]] = [[] for _ in batch.questions]
    for turn in range(max(len(question.turns) for question in batch.questions)):
        asked = [index for index, question in enumerate(batch.questions) if turn < len(question.turns)]
        for index in asked:
            dialogues[index].append({"role": "user", "content": batch.questions[index].turns[turn]})
        outputs = llm.chat([dialogues[index] for index in asked], params, use_tqdm=False)
        for index, output in zip(asked, outputs, strict=True):
            dialogues[index].append({"role": "assistant", "content": output.outputs[0].text})
            tokens[index].append(list(output.outputs[0].token_ids))
    seconds = time.perf_counter() - start
    added = {name: value - before[name] for name, value in counters(llm).items()}
    return Answers(tokens, seconds, added["steps"], added["accepted"])


def tokens_per_step(answers: Sequence[Answers]) -> float:
    """Return the tokens that a step emits behind an answer's first token; 1 if there are no such steps."""
    return acceptance_length(sum(each.steps for each in answers), sum(each.accepted for each in answers))
