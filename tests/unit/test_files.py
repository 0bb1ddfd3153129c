# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.full_disk import largest_file
from vllm_medusa.files import WriteError, replaced_directory, replaced_file


def replace_directory(path: Path, name: str, error: BaseException | None = None) -> None:
    with replaced_directory(path) as temporary:
        (temporary / name).write_text("new")
        if error is not None:
            raise error


def replace_file(path: Path, error: BaseException | None = None) -> None:
    with replaced_file(path) as stream:
        stream.write("new")
        if error is not None:
            raise error


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones included."""
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "made" / "directory"
    replace_directory(path, "old")
    with pytest.raises(KeyboardInterrupt):
        replace_directory(path, "half", KeyboardInterrupt())
    assert tree(tmp_path) == {"made/directory/old": "new"}
    replace_directory(path, "other")
    assert tree(tmp_path) == {"made/directory/other": "new"}
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "made" / "file"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, KeyboardInterrupt())
    assert tree(tmp_path) == {"made/file": "old"}
    replace_file(path)
    replace_file(tmp_path / "absent" / "file")
    assert tree(tmp_path) == {"made/file": "new", "absent/file": "new"}


def test_a_file_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path):
    path = tmp_path / "directory"
    path.mkdir()
    with pytest.raises(OSError, match=f"^{path} cannot be written .*; make room or give another directory"):
        replace_file(path)
    assert list(tmp_path.iterdir()) == [path]


def killed_while(work: Callable[[], None]) -> None:
    """Do the work in a process that is killed in the middle of it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_of_a_directory_is_deleted_by_the_next(tmp_path: Path):
    path = tmp_path / "directory"

    def be_killed() -> None:
        with replaced_directory(path) as temporary:
            (temporary / "half").write_text("written")
            kill_me()

    killed_while(be_killed)
    assert [file.partition("/")[2] for file in tree(tmp_path)] == ["half"]
    replace_directory(path, "whole")
    assert tree(tmp_path) == {"directory/whole": "new"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_another_process_is_writing_is_left_alone(tmp_path: Path):
    with replaced_directory(tmp_path / "directory") as temporary:
        (temporary / "slow").write_text("new")
        replace_directory(tmp_path / "directory", "fast")
        assert temporary.exists()
    assert tree(tmp_path) == {"directory/slow": "new"}


def test_what_a_killed_process_leaves_of_a_file_is_overwritten_by_the_next(tmp_path: Path):
    def be_killed() -> None:
        with replaced_file(tmp_path / "file") as stream:
            stream.write("half")
            stream.flush()
            kill_me()

    killed_while(be_killed)
    assert not (tmp_path / "file").exists()
    replace_file(tmp_path / "file")
    assert tree(tmp_path) == {"file": "new"}


def save_as_safetensors(path: Path) -> None:
    save_file({"tensor": torch.zeros(10_000)}, path)


def save_as_pickle(path: Path) -> None:
    with path.open("wb") as stream:
        torch.save({"tensor": torch.zeros(10_000)}, stream)


def save_as_text(path: Path) -> None:
    path.write_text("text" * 10_000)


@pytest.mark.parametrize("save", [save_as_safetensors, save_as_pickle, save_as_text])
def test_a_full_disk_is_blamed_on_the_directory_that_was_asked_for(tmp_path: Path, save: Callable[[Path], None]):
    path = tmp_path / "outer"

    def write() -> None:
        with replaced_directory(path) as outer, replaced_directory(outer / "inner") as inner:
            save(inner / "file")

    with largest_file(1024), pytest.raises(WriteError) as refused:
        write()
    advice = "make room or give another directory, then run the same command again"
    assert str(refused.value) == f"{path} cannot be written (File too large); {advice}"
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_no_failed_write_stays_what_it_is(tmp_path: Path):
    with pytest.raises(FileNotFoundError), replaced_directory(tmp_path / "directory"):
        (tmp_path / "absent").read_text()
    with pytest.raises(RuntimeError, match=r"^another$"), replaced_directory(tmp_path / "directory"):
        raise RuntimeError("another")
