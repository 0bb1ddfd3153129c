# SPDX-License-Identifier: Apache-2.0
"""A corpus that every machine has: the code of Python's standard library.

Comments and docstrings are removed: in a few minutes a small model learns to predict code, but not prose.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
"""Directories of other packages, of tables, or of files that some distributions lack."""

HELD_OUT_SHARE = 20
"""One file in so many is held out."""

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, and held-out texts; they depend only on Python's version."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(characters: int, held_out_characters: int = 200_000) -> Corpus:
    """Read files until both parts of the corpus have at least so many characters.

    Checksums of the files' names determine their order and which are held out: mixed, but always the same.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted((path.as_posix() for path in paths if not SKIPPED.intersection(path.parts)), key=_mixed)
    training = (root / name for name in names if not _is_held_out(name))
    held_out = (root / name for name in names if _is_held_out(name))
    return Corpus(_read(training, characters), _read(held_out, held_out_characters))


def strip_prose(source: str) -> str:
    """Return a module's code without comments and docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some library modules have invalid escape sequences.
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _read(paths: Iterable[Path], characters: int) -> tuple[str, ...]:
    texts: list[str] = []
    taken = 0
    for text in _modules(paths):
        if taken >= characters:
            break
        texts.append(text)
        taken += len(text)
    return tuple(texts)


def _modules(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        source = path.read_text(encoding="utf-8", errors="ignore")
        if "def " in source:  # Modules without functions are tables.
            yield strip_prose(source)


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def _mixed(name: str) -> tuple[int, str]:
    # The checksum must differ from that of _is_held_out.
    return zlib.adler32(name.encode()) % 9973, name
