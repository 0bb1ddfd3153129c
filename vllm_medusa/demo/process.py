# SPDX-License-Identifier: Apache-2.0
"""Engines in separate processes that take turns: each carries out one order at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

Serve = Callable[..., None]
"""The function that a process runs, given a connection for orders and answers, and further arguments."""

NEXT_TURN = "next turn"
"""What a contender is sent to go on with an order that is not finished."""


class Progress(Protocol):
    """How far an order is, as a contender answers."""

    @property
    def finished(self) -> bool:
        """Whether the order is carried out."""


Answer = TypeVar("Answer", bound=Progress)


class Contender:
    """A process that runs an engine.

    By default all are forked from one process that has imported vLLM, so they start fast and have the same libraries.

    Args:
        name: the name in error messages.
        serve: a module-level function; it returns when the connection is closed.
        arguments: further arguments of ``serve``.
        environment: additional environment variables.
        log: the file for its output.
        forked: whether to fork it. CUDA, and Triton's interpreter, need a process that begins anew.

    """

    def __init__(
        self,
        name: str,
        serve: Serve,
        arguments: tuple[Any, ...],
        environment: Mapping[str, str],
        log: Path,
        *,
        forked: bool = True,
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        context: ForkServerContext | SpawnContext
        if forked:
            start_fork_server()
            context = multiprocessing.get_context("forkserver")
        else:
            context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_run, args=(theirs, serve, arguments, dict(environment), log), name=name, daemon=True
        )
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()

    def ask(self, order: Any) -> Any:
        """Send an order and wait for its answer (see ``answer``)."""
        with suppress(BrokenPipeError):  # answer() reports why the process ended.
            self._connection.send(order)
        return self.answer()

    def answer(self) -> Any:
        """Wait for an answer; raises ``RuntimeError`` if the process ends instead."""
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"contender {self.name!r} ended early; the end of {self.log}:\n{tail}") from None


def take_turns(
    contenders: Sequence[Contender], order: Any, watch: Callable[[Mapping[str, Answer]], None] = lambda _: None
) -> dict[str, Answer]:
    """Let contenders carry out the same order turn by turn until all are done.

    Args:
        contenders: each pauses after a turn, and goes on when it is sent ``NEXT_TURN``.
        order: what to do.
        watch: called after each turn with how far the contenders are that have begun.

    Returns:
        Each contender's last answer, by its name.

    """
    states: dict[str, Answer] = {}
    while waiting := [each for each in contenders if each.name not in states or not states[each.name].finished]:
        for contender in waiting:
            states[contender.name] = contender.ask(NEXT_TURN if contender.name in states else order)
            watch(states)
    return states


def answer_in_turns(connection: Connection, answers: Iterable[Progress]) -> None:
    """Be a contender that takes turns: send an order's answers, and wait for ``NEXT_TURN`` behind all but the last."""
    for answer in answers:
        connection.send(answer)
        if not answer.finished:
            connection.recv()


def start_fork_server() -> None:
    """Start the process from which contenders are forked, if it does not run yet; its imports go on in the background.

    ``share_environment`` must have been called.
    """
    forkserver.set_forkserver_preload(["vllm_medusa.demo.preload"])
    forkserver.ensure_running()


def share_environment() -> None:
    """Set the environment variables that contenders inherit; must be called before their fork server starts.

    All engines start at the same time, so each starts with one thread; ``torch.set_num_threads`` sets more later.
    """
    libraries = [str(path) for path in Path(sys.prefix, "lib").glob("libiomp5.so")]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # vLLM recommends it; without it, speculative decoding on a CPU is slower.
        "LD_PRELOAD": ":".join(libraries),
        # Otherwise that library binds every forked process to the first core.
        "OMP_PROC_BIND": "false",
        # Milliseconds that its idle threads spin, as vLLM sets them: by default they would for 200 of the next turn.
        "KMP_BLOCKTIME": "5",
    }


def _run(
    connection: Connection, serve: Serve, arguments: tuple[Any, ...], environment: dict[str, str], log: Path
) -> None:
    os.environ |= environment
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    with suppress(EOFError, BrokenPipeError):  # The parent has closed the connection.
        serve(connection, *arguments)
