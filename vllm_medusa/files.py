# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, where a reader sees a file or directory as it was before or complete; and JSON."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from vllm_medusa.messages import one_line

ADVICE = "make room or give another directory, then run the same command again"

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that only a write has; such an error need not name a file."""

FAILED_WRITES = ("os error", "PytorchStreamWriter", "inline_container")
"""What the messages of safetensors and of ``torch.save`` hold if a write failed."""


class WriteError(OSError):
    """A file or directory cannot be written; the message names it, and not its temporary one, and says what to do.

    Attributes:
        reason: why, without what to do.
        advice: what to do.

    """

    def __init__(self, path: Path, error: BaseException, advice: str = ADVICE) -> None:
        self.reason, self.advice = _reason(error), advice
        number = error.errno if isinstance(error, OSError) else None
        super().__init__(number, f"{self.reason}; {advice}", str(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.reason}); {self.advice}"


@contextmanager
def named_write_errors(path: Path, advice: str) -> Iterator[None]:
    """Raise ``WriteError`` of this path, with this advice, where a write in this context fails."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _says_that_a_write_failed(error):
            raise
        raise WriteError(path, error, advice) from None


def require_writable(path: Path) -> None:
    """Raise ``WriteError`` if no file can be made where ``path`` is to be written, or if a directory is there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise WriteError(path, error) from error


@contextmanager
def replaced_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``directory`` at the end; after an error it is deleted instead.

    A killed process leaves the temporary directory behind. The next one to write ``directory`` deletes it.

    Raises:
        WriteError: the directory cannot be written.

    """
    path = Path(directory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_left_behind(path)
    except OSError as error:
        raise WriteError(path, error) from error
    try:
        with _locked_directory(path) as temporary:
            yield temporary
            # safetensors lets only the owner read its files, but another user may serve the model.
            for weights in temporary.rglob("*.safetensors"):
                weights.chmod(0o644)
            if path.exists():
                with _locked_directory(path) as old:
                    path.rename(old)
                    temporary.rename(path)
            else:
                temporary.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        if _is_failed_write(error, path):
            raise WriteError(path, error) from error
        raise


@contextmanager
def replaced_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Yield a temporary file that replaces ``path`` at the end; after an error it is deleted instead.

    A killed process leaves the temporary file behind. The next one to write ``path`` overwrites it.

    Raises:
        WriteError: the file cannot be written.

    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, encoding="utf-8" if mode == "w" else None) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _delete(temporary)
        raise WriteError(path, error) from error
    except BaseException:
        _delete(temporary)
        raise


@contextmanager
def _locked_directory(path: Path) -> Iterator[Path]:
    """Yield a directory beside ``path``, locked while its process lives; it is deleted at the end if it is there."""
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        temporary.chmod(0o755)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _delete_left_behind(path: Path) -> None:
    """Delete temporary directories of ``path`` whose processes are gone."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # Its process lives.
        finally:
            os.close(lock)


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _reason(error: BaseException) -> str:
    """Return why a write failed; ``torch.save`` hides it behind an error of its own."""
    if isinstance(error, WriteError):
        return error.reason
    if number := re.search(r"os error (\d+)", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    return _reason(error.__context__) if isinstance(error.__context__, OSError) else one_line(error)


def _is_failed_write(error: Exception, path: Path) -> bool:
    if not isinstance(error, OSError):
        return _says_that_a_write_failed(error)
    named = Path(str(error.filename or ""))
    is_own = named == path or any(each.name.startswith(_prefix(path)) for each in (named, *named.parents))
    return is_own or (error.errno in DISK_IS_FULL and not isinstance(error, WriteError))


def _says_that_a_write_failed(error: Exception) -> bool:
    return any(name in str(error) for name in FAILED_WRITES)


def _delete(file: Path) -> None:
    """Delete a file; what keeps it from being written may keep it from being deleted too."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON; the message is one line that names the file.
        OSError: the file cannot be read.

    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def parse_json(text: str) -> Any:
    """Parse JSON; whatever is wrong with it is a ``ValueError``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("a value is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python advises to raise its limit.
        raise ValueError("an integer has too many digits") from None


def write_json(path: Path, content: Any) -> None:
    """Write or replace a JSON file."""
    with replaced_file(path) as stream:
        stream.write(json.dumps(content, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
