# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a reader sees a file or directory as it was before, or complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal


@contextmanager
def replaced_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``directory`` at the end; after an error it is deleted instead."""
    path = Path(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        # safetensors lets only the owner read its files, but another user may serve the model.
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(0o644)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Yield a temporary file that replaces ``path`` at the end; after an error it is deleted instead.

    A killed process leaves the temporary file behind. The next one to write ``path`` overwrites it.

    Raises:
        OSError: the file cannot be written; the message says what to do.

    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open(mode, encoding="utf-8" if mode == "w" else None) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        advice = "make room or give another directory, then run the same command again"
        raise OSError(error.errno, f"{error.strerror}; {advice}", str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write or replace a JSON file."""
    with replaced_file(path) as stream:
        stream.write(json.dumps(content, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
