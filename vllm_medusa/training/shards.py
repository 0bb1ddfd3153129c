"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def shard_path(directory: Path, number: int) -> Path:
    """Return where a shard, counted from 0, stands once it is finished."""
    return directory / f"shard-{number:05d}.jsonl"


@contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """Give a temporary sibling to write; on success it takes the file's place, on an error it vanishes.

    A process that is killed leaves the sibling behind; the next one that writes the same file takes it over.

    Raises:
        OSError: it cannot be written; one line that says what to do.

    """
    temporary = path.with_name(f".{path.name}.tmp")
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


def sha256_of(path: Path) -> str:
    """Return a file's checksum in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
