# SPDX-License-Identifier: Apache-2.0
"""Which way an engine attends for trees on a CPU, what it says of it, and the build of the fused op."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from vllm_medusa.attention.cpu import build, selection
from vllm_medusa.attention.cpu.fused import FusedTrees
from vllm_medusa.attention.cpu.padded import PaddedTrees
from vllm_medusa.attention.cpu.selection import VARIABLE, selected_pass


@pytest.fixture(autouse=True)
def nothing_selected() -> Iterator[None]:
    selection._selected.cache_clear()
    yield
    selection._selected.cache_clear()


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of extensions."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []

    def note(message: str, *arguments: object) -> None:
        lines.append(message % arguments)

    with mock.patch.multiple(selection.logger, info=note, warning=note):
        yield lines


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the compiler and the loader; the list says what each has done."""
    done: list[str] = []

    def make(directory: Path) -> None:
        done.append("built")
        (directory / f"{build.NAME}.so").write_text("library")

    monkeypatch.setattr(build, "_build", make)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: done.append(f"loaded {Path(path).read_text()}"))
    return done


def test_the_fused_op_is_taken_where_it_is_built_and_the_log_says_so_once(log: list[str]) -> None:
    with mock.patch.object(selection, "load_library", return_value=21.4) as load:
        assert selected_pass() is FusedTrees
        assert selected_pass() is FusedTrees
    load.assert_called_once()
    assert log == ["Medusa: draft trees attend by the fused op, built in 21 s"]


def test_torch_calls_are_taken_where_they_are_asked_for(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    with mock.patch.object(selection, "load_library") as load:
        assert selected_pass() is PaddedTrees
    load.assert_not_called()
    assert log == [f"Medusa: draft trees attend by torch calls, as {VARIABLE} asks"]


@pytest.mark.usefixtures("extensions")
def test_without_a_compiler_torch_calls_are_taken_and_the_log_says_why_once(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert selected_pass() is PaddedTrees
    assert selected_pass() is PaddedTrees
    assert len(log) == 1
    assert "there is no C++ compiler 'no-such-compiler'" in log[0]
    assert f"{VARIABLE}=torch" in log[0]


@pytest.mark.usefixtures("extensions")
def test_without_a_compiler_an_engine_that_must_have_the_fused_op_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(VARIABLE, "fused")
    with pytest.raises(ValueError, match=VARIABLE) as error:
        selected_pass()
    assert "no-such-compiler" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_compiler_that_fails_is_named_with_its_first_error(
    extensions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("#error not today\n")
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(build.BuildError, match="not today") as error:
        build.load_library()
    assert "\n" not in str(error.value)
    assert not list(extensions.glob("*/*.so"))


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'fast'; it must be one of auto, fused, torch"):
        selected_pass()


def test_processes_that_start_together_build_once(extensions: Path, built: list[str]) -> None:
    starts = [threading.Thread(target=build.load_library) for _ in range(4)]
    for each in starts:
        each.start()
    for each in starts:
        each.join()
    assert sorted(built) == ["built", *["loaded library"] * 3]
    assert [path.suffix for path in sorted(extensions.iterdir())].count("") == 1


def test_a_build_that_is_cut_short_leaves_nothing_that_is_loaded_later(
    extensions: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build._build

    def cut_short(directory: Path) -> None:
        (directory / f"{build.NAME}.so").write_text("half of it")
        raise RuntimeError("cut short")

    monkeypatch.setattr(build, "_build", cut_short)
    with pytest.raises(build.BuildError, match="cut short"):
        build.load_library()
    monkeypatch.setattr(build, "_build", whole)
    build.load_library()
    build.load_library()
    assert built == ["built", "loaded library"]


@pytest.mark.usefixtures("extensions")
def test_another_cpu_torch_or_source_has_a_library_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = {build.build_directory()}
    for module, name, value in (
        (build, "cpu_description", lambda: "another CPU"),
        (torch, "__version__", "0.1"),
        (build, "SOURCE", tmp_path / "other.cpp"),
    ):
        (tmp_path / "other.cpp").write_text("// another source")
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            directories.add(build.build_directory())
    assert len(directories) == 4


def test_a_cpu_is_described_by_its_model_and_capabilities_not_by_its_clock(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Fast\ncpu MHz\t: 2000.1\nflags\t: avx2 fma\n\nmodel name\t: Second\n")
    assert build.cpu_description(info) == "model name\t: Fast\nflags\t: avx2 fma"
    assert build.cpu_description(tmp_path / "nowhere")
