"""Files and directories that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replaced_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary sibling to fill; on success it takes the directory's place, on an error it vanishes."""
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        # safetensors makes files that nobody but their owner may read; who serves a model is often another user.
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """Give a temporary sibling to write; on success it takes the file's place, on an error it vanishes.

    A process that is killed leaves the sibling behind; the next one that writes the same file takes it over.

    Raises:
        OSError: it cannot be written; one line that says what to do.

    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as stream:
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
