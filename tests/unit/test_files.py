# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from vllm_medusa.files import replaced_directory, replaced_file


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
