"""Text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
"""Directories that are not the library itself, or that some distributions leave out."""

HELD_OUT_SHARE = 20
"""One file in so many is kept out of training."""


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, and texts that no training sees; the same for the same version of Python."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(characters: int) -> Corpus:
    """Read the standard library's source.

    The order of the files, and which are held out, follow from a checksum of their names: mixed, but always the same.

    Args:
        characters: training files are taken until they hold so many characters; held-out ones are all taken.

    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted((path.as_posix() for path in paths if not SKIPPED.intersection(path.parts)), key=_mixed)
    training: list[str] = []
    held_out: list[str] = []
    taken = 0
    for name in names:
        if _checksum(name) % HELD_OUT_SHARE == 0:
            held_out.append((root / name).read_text(encoding="utf-8", errors="ignore"))
        elif taken < characters:
            training.append((root / name).read_text(encoding="utf-8", errors="ignore"))
            taken += len(training[-1])
    return Corpus(tuple(training), tuple(held_out))


def _checksum(name: str) -> int:
    return zlib.crc32(name.encode())


def _mixed(name: str) -> tuple[int, str]:
    # The order may not depend on the checksum's remainder, which says whether a file is held out.
    return _checksum(name[::-1]), name
