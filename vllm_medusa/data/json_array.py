# SPDX-License-Identifier: Apache-2.0
"""Read a JSON array item by item, without holding all of it in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
"""Characters read at once."""


class ArraySyntaxError(ValueError):
    """The JSON array is broken at ``line``."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


def array_items(stream: TextIO, chunk: int = CHUNK) -> Iterator[tuple[int, Any]]:
    """Yield each item of the array in ``stream``, and the line on which the item begins, counted from 1.

    Raises:
        ArraySyntaxError: the stream is not one JSON array. The items before the error have been yielded by then.

    """
    window = _Window(stream, chunk)
    window.take("[")
    separator = window.take("]") if window.next_character() == "]" else ","
    while separator == ",":
        window.next_character()
        yield window.line, window.take_value()
        separator = window.take(",]")
    if rest := window.next_character():
        raise ArraySyntaxError(f"{rest!r} follows the array's end", window.line)


class _Window:
    """A buffer of the stream; the text from ``_position`` on has been read but not yet taken."""

    def __init__(self, stream: TextIO, chunk: int) -> None:
        self._stream = stream
        self._chunk = chunk
        self._buffer = ""
        self._position = 0
        self._exhausted = False
        self._decoder = json.JSONDecoder()
        self.line = 1

    def next_character(self) -> str:
        """Skip white space and return the next character without taking it; "" at the stream's end."""
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
        character = self.next_character()
        if not character or character not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ArraySyntaxError(
                f"expected {expected}, got {character!r}" if character else "it ends early", self.line
            )
        self._advance(self._position + 1)
        return character

    def take_value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if self._exhausted:
                    line = self.line + self._buffer.count("\n", self._position, error.pos)
                    raise ArraySyntaxError(error.msg, line) from None
            except RecursionError:
                raise ArraySyntaxError("a value is nested too deeply", self.line) from None
            except ValueError:  # Python advises to raise its limit.
                raise ArraySyntaxError("an integer has too many digits", self.line) from None
            else:
                # A number at the buffer's end may have more digits in the stream.
                if end < len(self._buffer) or self._exhausted:
                    self._advance(end)
                    return value
            self._read()

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _read(self) -> None:
        """Read at least as many characters as are left, so that a long value is parsed only a few times."""
        rest = self._buffer[self._position :]
        read = self._stream.read(max(self._chunk, len(rest)))
        self._buffer, self._position, self._exhausted = rest + read, 0, not read
