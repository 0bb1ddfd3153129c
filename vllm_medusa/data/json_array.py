"""A JSON array that is read item by item, however long it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
"""Characters read at once."""


class ArraySyntaxError(ValueError):
    """A JSON array that is broken at ``line``."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


def array_items(stream: TextIO, chunk: int = CHUNK) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON array, each with the line where it begins, counted from 1.

    Args:
        stream: holds the array and nothing else.
        chunk: characters read at once.

    Raises:
        ArraySyntaxError: it is not a JSON array; the items before the break have been yielded.

    """
    window = _Window(stream, chunk)
    window.take("[")
    separator = window.take("]") if window.next_character() == "]" else ","
    while separator == ",":
        window.next_character()
        yield window.line, window.take_value()
        separator = window.take(",]")
    if rest := window.next_character():
        raise ArraySyntaxError(f"{rest!r} follows its end", window.line)


class _Window:
    """The part of a stream that has been read and not been taken yet, from ``position`` on."""

    def __init__(self, stream: TextIO, chunk: int) -> None:
        self._stream = stream
        self._chunk = chunk
        self._buffer = ""
        self._position = 0
        self._exhausted = False
        self._decoder = json.JSONDecoder()
        self.line = 1

    def next_character(self) -> str:
        """Pass over white space and return what comes next, without taking it; nothing at the stream's end."""
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if character not in " \t\r\n":
                    return character
                self._advance(self._position + 1)
            if self._exhausted:
                return ""
            self._read()

    def take(self, allowed: str) -> str:
        """Take one of the allowed characters."""
        character = self.next_character()
        if not character or character not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ArraySyntaxError(
                f"expected {expected}, got {character!r}" if character else "it ends early", self.line
            )
        self._advance(self._position + 1)
        return character

    def take_value(self) -> Any:
        """Take a JSON value that begins at the position."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if self._exhausted:
                    line = self.line + self._buffer.count("\n", self._position, error.pos)
                    raise ArraySyntaxError(error.msg, line) from None
            else:
                # A number that ends where the buffer does may go on.
                if end < len(self._buffer) or self._exhausted:
                    self._advance(end)
                    return value
            self._read()

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _read(self) -> None:
        """Read at least as much as is there, so that a long value is tried a few times only."""
        rest = self._buffer[self._position :]
        read = self._stream.read(max(self._chunk, len(rest)))
        self._buffer, self._position, self._exhausted = rest + read, 0, not read
