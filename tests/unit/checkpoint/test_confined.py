# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_medusa.checkpoint.confined import indexed_files, require_inside


def test_an_index_gives_its_files_once_each(tmp_path: Path) -> None:
    names = ["b.safetensors", "a.bin", "b.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "index").write_text(json.dumps({"weight_map": dict(zip("xyz", names, strict=True))}))
    assert indexed_files(tmp_path / "index") == [tmp_path / "a.bin", tmp_path / "b.safetensors"]


def test_links_within_a_snapshot_of_the_hubs_cache_stay_inside(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--heads"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab").touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab")
    require_inside(snapshot / "model.safetensors")
    (snapshot / "other.safetensors").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link that leaves"):
        require_inside(snapshot / "other.safetensors")


def test_a_directory_that_is_a_link_itself_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.safetensors").touch()
    (tmp_path / "link").symlink_to("real")
    require_inside(tmp_path / "link" / "model.safetensors")
