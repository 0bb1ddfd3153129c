# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from vllm_medusa.checkpoint import hub
from vllm_medusa.checkpoint.hub import local_directory


def test_a_name_that_is_no_directory_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda name: str(tmp_path / name))
    assert local_directory("some/heads") == tmp_path / "some/heads"
    assert local_directory(str(tmp_path)) == tmp_path


def test_a_name_that_cannot_be_fetched_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give the directory"):
        local_directory(str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=r"no/heads is neither a directory nor a repository that can be downloaded \("
    ) as error:
        local_directory("no/heads")
    assert "\n" not in str(error.value)
