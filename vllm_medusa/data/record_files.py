# SPDX-License-Identifier: Apache-2.0
"""Read files of records one by one: JSON lines, a JSON array, or plain text."""

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
from vllm_medusa.files import parse_json

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIX = ".txt"

Parsed = TypeVar("Parsed")


class BadLines(StrEnum):
    """What to do with a line that holds no valid record."""

    REFUSE = "refuse"
    SKIP = "skip"

    @classmethod
    def from_flag(cls, skip_bad: bool) -> BadLines:
        return cls.SKIP if skip_bad else cls.REFUSE


@dataclass(frozen=True)
class Source:
    """A record's file and line, counted from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class BadLineError(ValueError):
    """A line holds no valid record; the message is ``file:line: reason; what to do``."""


class BadLineCounter:
    """Refuses bad lines or counts them, as ``policy`` says.

    Attributes:
        count: number of skipped lines.
        first: the first skipped line and the reason.

    """

    def __init__(self, policy: BadLines) -> None:
        self.policy = policy
        self.count = 0
        self.first: str | None = None

    def add(self, source: Source, reason: object) -> None:
        """Count a bad line; raise ``BadLineError`` if bad lines are refused."""
        message = f"{source}: {reason}"
        if self.policy is BadLines.REFUSE:
            raise BadLineError(f"{message}; correct the line, or skip such lines with --skip-bad")
        self.count += 1
        self.first = self.first or message

    def report(self) -> None:
        """Log the number of skipped lines, if there are any."""
        if self.count:
            logger.warning("bad lines skipped: %d; the first is %s", self.count, self.first)


def read_records(files: Sequence[Path], bad_lines: BadLineCounter) -> Iterator[tuple[Source, Record]]:
    """Read training records one by one: ``parse_record`` for each of the ``parsed_lines``."""
    return parsed_lines(files, parse_record, bad_lines)


def parsed_lines(
    files: Sequence[Path], parse: Callable[[Any], Parsed], bad_lines: BadLineCounter
) -> Iterator[tuple[Source, Parsed]]:
    """Read files and parse every line.

    Args:
        files: files as ``read_lines`` reads them; a directory stands for its ``.jsonl`` files.
        parse: parses a line's JSON value; raises ``ValueError`` if the value is bad.
        bad_lines: refuses or counts the bad lines.

    Raises:
        BadLineError: a line is bad and bad lines are refused.
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
    """Replace each directory by its ``.jsonl`` files, sorted by name; ``ValueError`` if it has none."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} is a directory without .jsonl files")
        files.extend(found)
    return files


def read_lines(file: Path, bad_lines: BadLineCounter) -> Iterator[tuple[Source, Any]]:
    """Yield the JSON values of one file and the lines on which they begin.

    A ``.jsonl`` or ``.json`` file holds one value per line, or one array of values if its first character is ``[``.
    A line of a ``.txt`` file is read as ``{"text": line}``. Blank lines are skipped. Files are UTF-8 and are read
    piece by piece.

    Raises:
        BadLineError: a line is not JSON or not UTF-8, and bad lines are refused.
        ValueError: the file has another suffix, or an array is broken. The rest of a broken array cannot be read, so
            this is never skipped.
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
    return _text_lines(file, parse_json, bad_lines)


def _first_character(file: Path) -> bytes:
    with file.open("rb") as stream:
        for line in stream:
            if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
                return stripped[:1]
    return b""


def _text_record(line: str) -> dict[str, str]:
    return {"text": line}


def _text_lines(file: Path, parse: Callable[[str], Any], bad_lines: BadLineCounter) -> Iterator[tuple[Source, Any]]:
    with file.open("rb") as stream:  # In text mode, a line that is not UTF-8 could not be skipped.
        for number, line in enumerate(stream, start=1):
            source = Source(file, number)
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield source, parse(text)
            except json.JSONDecodeError as error:
                bad_lines.add(source, f"not JSON: {error.msg} at character {error.pos + 1}")
            except UnicodeDecodeError as error:
                bad_lines.add(source, f"not UTF-8: {error.reason} at byte {error.start + 1}")
            except ValueError as error:
                bad_lines.add(source, f"not JSON: {error}")


def _array_items(file: Path) -> Iterator[tuple[Source, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        try:
            for line, value in array_items(stream):
                yield Source(file, line), value
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8: {error.reason}") from None
        except ArraySyntaxError as error:
            raise ValueError(f"{file}:{error.line}: the JSON array is broken: {error}") from None
