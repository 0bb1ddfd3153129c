# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.gguf_files import write_gguf
from tests.unit.published import write_original
from vllm_medusa.checkpoint import conversion, gguf
from vllm_medusa.cli import app
from vllm_medusa.cli.errors import INTERRUPTED, one_line_errors


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)


def interrupted_in_a_library() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise TypeError("could not determine the shape of a tensor") from None


@pytest.mark.parametrize("work", [interrupted, interrupted_in_a_library])
def test_an_interrupt_is_one_line_with_the_status_of_an_interrupt(
    work: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as ended, one_line_errors():
        work()
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == f"{INTERRUPTED}\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_that_no_user_can_mend_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="ours"), one_line_errors():
        raise TypeError("ours")


def conversion_of(directory: Path) -> list[object]:
    write_original(directory / "heads")
    return ["convert", directory / "heads", directory / "new" / "output"]


def import_of_gguf(directory: Path) -> list[object]:
    write_gguf(directory / "tiny.gguf")
    return ["fetch-demo", "--gguf", directory / "tiny.gguf", "--output", directory / "new" / "output"]


@pytest.mark.parametrize(
    ("command", "module", "last_step"),
    [(conversion_of, conversion, "_write"), (import_of_gguf, gguf, "installed_versions")],
)
def test_an_interrupted_command_leaves_nothing_and_a_second_run_is_whole(
    command: Callable[[Path], list[object]],
    module: Any,
    last_step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = list(map(str, command(tmp_path)))
    written: list[str] = []

    def interrupted_after(*given: Any) -> None:
        step(*given)
        written.extend(path.name for path in (tmp_path / "new").rglob("*.safetensors"))
        interrupted()

    step = getattr(module, last_step)
    with monkeypatch.context() as patched:
        patched.setattr(module, last_step, interrupted_after)
        ended = CliRunner().invoke(app, arguments)
    assert written == ["model.safetensors"]
    assert ended.exit_code == 130, ended.output
    assert ended.stderr.splitlines()[-1] == INTERRUPTED
    assert list((tmp_path / "new").iterdir()) == []
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["output"]
