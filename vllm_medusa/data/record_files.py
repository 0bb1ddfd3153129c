"""Files of records: JSON lines, a JSON array, or plain text, read one record at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from vllm_medusa.data.json_array import ArraySyntaxError, array_items
from vllm_medusa.data.records import Record, parse_record

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIX = ".txt"

Parsed = TypeVar("Parsed")


class BadLines(StrEnum):
    """What to do about a line that holds no good record."""

    REFUSE = "refuse"
    SKIP = "skip"

    @classmethod
    def from_flag(cls, skip_bad: bool) -> BadLines:
        """Read the flag ``--skip-bad``."""
        return cls.SKIP if skip_bad else cls.REFUSE


@dataclass(frozen=True)
class Source:
    """Where a record stands: a file and a line, counted from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class BadLineError(ValueError):
    """A line that holds no good record: ``file:line: reason; what to do``."""


class BadLineCounter:
    """Refuses bad lines, or counts them.

    Args:
        policy: which of the two.

    Attributes:
        count: the lines that were skipped.
        first: what was wrong with the first of them.

    """

    def __init__(self, policy: BadLines) -> None:
        self.policy = policy
        self.count = 0
        self.first: str | None = None

    def add(self, source: Source, reason: object) -> None:
        """Take notice of a bad line.

        Raises:
            BadLineError: bad lines are refused.

        """
        message = f"{source}: {reason}"
        if self.policy is BadLines.REFUSE:
            raise BadLineError(f"{message}; correct the line, or skip such lines with --skip-bad")
        self.count += 1
        self.first = self.first or message

    def report(self) -> None:
        """Log how many lines were skipped, if any were."""
        if self.count:
            logger.warning("bad lines skipped: %d; the first is %s", self.count, self.first)


def read_records(files: Sequence[Path], bad_lines: BadLineCounter) -> Iterator[tuple[Source, Record]]:
    """Read training records, one after another; see ``parsed_lines`` for the files and ``parse_record`` for a line."""
    return parsed_lines(files, parse_record, bad_lines)


def parsed_lines(
    files: Sequence[Path], parse: Callable[[Any], Parsed], bad_lines: BadLineCounter
) -> Iterator[tuple[Source, Parsed]]:
    """Read files and make something of every line.

    Args:
        files: what ``read_lines`` takes; a directory stands for its ``.jsonl`` files.
        parse: takes a line's JSON value; raises ``ValueError`` with the reason where it is no good.
        bad_lines: what happens then.

    Raises:
        BadLineError: a line is no good and bad lines are refused.
        ValueError: a directory holds no ``.jsonl`` file, or see ``read_lines``.
        OSError: a file cannot be read.

    """
    for source, value in chain.from_iterable(read_lines(file, bad_lines) for file in without_directories(files)):
        try:
            parsed = parse(value)
        except ValueError as error:
            bad_lines.add(source, error)
        else:
            yield source, parsed


def without_directories(paths: Sequence[Path]) -> list[Path]:
    """Put a directory's ``.jsonl`` files, in the order of their names, in the directory's place.

    Raises:
        ValueError: a directory holds none.

    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} is a directory without .jsonl files")
        files.extend(found)
    return files


def read_lines(file: Path, bad_lines: BadLineCounter) -> Iterator[tuple[Source, Any]]:
    """Yield the JSON values of one file and the lines where they begin.

    ``.jsonl`` and ``.json`` hold one value a line, or an array of values, which is told by the first character.
    ``.txt`` holds one document, or one prompt, a line, which counts as ``{"text": line}``. Blank lines are passed over.
    Files are UTF-8, and never in memory as a whole.

    Raises:
        BadLineError: a line is not JSON or not UTF-8, and bad lines are refused.
        ValueError: the file's suffix is none of these, or an array is broken: what follows cannot be told apart, so
            that is never skipped.
        OSError: the file cannot be read.

    """
    if file.suffix == TEXT_SUFFIX:
        return _text_lines(file, _text_record, bad_lines)
    if file.suffix not in JSON_SUFFIXES:
        raise ValueError(
            f"{file}: unknown kind of file {file.suffix!r}; give {', '.join(JSON_SUFFIXES)} or {TEXT_SUFFIX}"
        )
    if _first_character(file) == b"[":
        return _array_items(file)
    return _text_lines(file, json.loads, bad_lines)


def _first_character(file: Path) -> bytes:
    with file.open("rb") as stream:
        for line in stream:
            if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
                return stripped[:1]
    return b""


def _text_record(line: str) -> dict[str, str]:
    return {"text": line}


def _text_lines(file: Path, parse: Callable[[str], Any], bad_lines: BadLineCounter) -> Iterator[tuple[Source, Any]]:
    with file.open("rb") as stream:  # As text, a line that is not UTF-8 would end the reading.
        for number, line in enumerate(stream, start=1):
            source = Source(file, number)
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield source, parse(text)
            except json.JSONDecodeError as error:
                bad_lines.add(source, f"not JSON: {error.msg} at character {error.pos + 1}")
            except UnicodeDecodeError as error:
                bad_lines.add(source, f"not UTF-8: {error.reason} at byte {error.start + 1}")


def _array_items(file: Path) -> Iterator[tuple[Source, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        try:
            for line, value in array_items(stream):
                yield Source(file, line), value
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8: {error.reason}") from None
        except ArraySyntaxError as error:
            raise ValueError(f"{file}:{error.line}: the JSON array is broken: {error}") from None
