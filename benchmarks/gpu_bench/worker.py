# SPDX-License-Identifier: Apache-2.0
"""Processes that measure: each builds one object and then answers calls of its methods, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_medusa.demo.process import Contender

LOGS = Path("build/gpu/logs")
REPOSITORY = Path(__file__).parents[2]
REHEARSED = "v2 cuda flash async"
"""What engines of the tiny mode are: the CUDA worker's life on a CPU, with the attention backend that vLLM selects on
recent GPUs (see ``tests.under_test``)."""

Failed = Callable[[str, Exception], None]
"""Told what could not be measured, and why."""

_kept = ExitStack()
"""What a process is prepared with until its end."""


class Worker:
    """A process that measures.

    Args:
        name: its name in error messages and of its log.
        build: makes the object; a module-level function or class.
        arguments: its arguments.
        environment: further environment variables.

    """

    def __init__(self, name: str, build: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self.name = name
        log = LOGS / f"{name.replace(' ', '-')}.log"
        self._process = Contender(name, _serve, (build, arguments), environment, log, forked=False)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__()

    def wait(self) -> None:
        """Wait until the object is built."""
        self._process.answer()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method; raises ``RuntimeError`` with the end of the log if the process ends instead."""
        return self._process.ask((method, arguments))


@contextmanager
def started(workers: Sequence[Worker], failed: Failed) -> Iterator[list[Worker]]:
    """Wait for workers that start side by side, yield those that did, and end them."""
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker)
        yield [worker for worker in workers if _has_started(worker, failed)]


def _has_started(worker: Worker, failed: Failed) -> bool:
    try:
        worker.wait()
    except RuntimeError as error:
        failed(worker.name, error)
        return False
    return True


def rehearsal(speculates: bool) -> dict[str, Any]:
    """Prepare this process, before it imports vLLM, for engines without a GPU; return further options for ``LLM``.

    What the tests rehearse the CUDA worker with is used here: the tests are the repository's, not the package's.
    """
    sys.path.insert(0, str(REPOSITORY))
    from tests.under_test import UnderTest

    under_test = UnderTest(frozenset(REHEARSED.split()))
    under_test.install()
    # A plain engine is the CPU's, whose warm-up samples from memory that nothing has written.
    return _kept.enter_context(under_test.medusa()) if speculates else {"enforce_eager": True}


def _serve(connection: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    measured = build(*arguments)
    connection.send(None)
    while True:
        method, given = connection.recv()
        connection.send(getattr(measured, method)(*given))
