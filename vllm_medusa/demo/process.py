"""Engines in processes of their own, which carry out one order at a time and so take turns."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

Serve = Callable[..., None]
"""What a process runs, given a connection, from which it takes orders and over which it answers, and arguments."""


class Contender:
    """A process that runs an engine.

    All are forked from one process that has imported vLLM, so that a further one starts in a moment and has the same
    libraries and the same environment but for what is asked for here.

    Args:
        name: what errors call it.
        serve: a function of a module's top level; it returns when the connection is closed.
        arguments: for ``serve``, after the connection.
        environment: variables that this process alone has.
        log: where its output goes.

    """

    def __init__(
        self, name: str, serve: Serve, arguments: tuple[Any, ...], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vllm_medusa.demo.preload"])
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
        """Send an order, wait for its answer.

        Raises:
            RuntimeError: the process ended instead.

        """
        with suppress(BrokenPipeError):  # What became of the process is told by the answer.
            self._connection.send(order)
        return self.answer()

    def answer(self) -> Any:
        """Wait for the process to say something.

        Raises:
            RuntimeError: the process ended instead.

        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            tail = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"contender {self.name!r} ended early; the end of {self.log}:\n{tail}") from None


def share_environment() -> None:
    """Give this process, and so all contenders, what an engine in a process of its own needs on a CPU.

    Must be called before the first contender starts. Engines begin with one thread each, for they start at the same
    time; ``torch.set_num_threads`` gives them more.
    """
    libraries = [str(path) for path in Path(sys.prefix, "lib").glob("libiomp5.so")]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # vLLM asks for it: without it speculation on a CPU is slower.
        "LD_PRELOAD": ":".join(libraries),
        # In a forked process that library would else bind every engine to the first core.
        "OMP_PROC_BIND": "false",
    }


def _run(
    connection: Connection, serve: Serve, arguments: tuple[Any, ...], environment: dict[str, str], log: Path
) -> None:
    os.environ |= environment
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    with suppress(EOFError, BrokenPipeError):  # Nobody gives orders any more.
        serve(connection, *arguments)
