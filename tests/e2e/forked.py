# SPDX-License-Identifier: Apache-2.0
"""Processes of their own that may be killed, forked from one that has imported what takes long to import."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vllm_medusa.training.run", "vllm_medusa.demo.preload"])
DONE_WITHIN = 300.0


@dataclass(frozen=True)
class Done:
    """A process that ended.

    Attributes:
        code: its exit code; minus a signal's number where that killed it.
        stdout: what it printed.
        stderr: what it complained of.

    """

    code: int
    stdout: str
    stderr: str


def run(function: Callable[..., None], *arguments: Any, directory: Path) -> Done:
    """Call a function of a module's top level in a process of its own.

    Args:
        function: what to call.
        arguments: for it.
        directory: what the process works in; it is made if it is not there.

    """
    directory.mkdir(exist_ok=True)
    logs = [directory.with_name(f"{directory.name}.{stream}") for stream in ("stdout", "stderr")]
    process = CONTEXT.Process(target=_in_directory, args=(directory, logs, function, arguments))
    process.start()
    process.join(DONE_WITHIN)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{function.__name__} is not done within {DONE_WITHIN} s:\n{logs[1].read_text()}")
    return Done(process.exitcode, *(log.read_text() for log in logs))


def run_command(*arguments: str) -> None:
    """Run ``vllm-medusa``, as the function of ``run``."""
    from vllm_medusa.cli import app

    sys.argv = ["vllm-medusa", *arguments]
    app()


def _in_directory(directory: Path, logs: list[Path], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.chdir(directory)
    for descriptor, log in enumerate(logs, start=1):
        with log.open("w") as stream:
            os.dup2(stream.fileno(), descriptor)
    function(*arguments)
