"""Text that every machine has: the code of Python's standard library.

Comments and docstrings are left out: in a few minutes a small model learns how code goes on, but not how prose does.
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
"""Directories that are not the library itself, that hold tables, or that some distributions leave out."""

HELD_OUT_SHARE = 20
"""One file in so many is kept out of training."""

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, and texts that no training sees; the same for the same version of Python."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(characters: int, held_out_characters: int = 200_000) -> Corpus:
    """Read the standard library's code.

    The order of the files, and which are held out, follow from a checksum of their names: mixed, but always the same.

    Args:
        characters: training files are taken until they hold so many characters.
        held_out_characters: and held-out ones until they hold so many.

    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted((path.as_posix() for path in paths if not SKIPPED.intersection(path.parts)), key=_mixed)
    training = (root / name for name in names if not _is_held_out(name))
    held_out = (root / name for name in names if _is_held_out(name))
    return Corpus(_read(training, characters), _read(held_out, held_out_characters))


def strip_prose(source: str) -> str:
    """Return a module's code without comments and docstrings.

    Raises:
        SyntaxError: it is not Python.

    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The library's own odd escapes are not this program's.
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
        if "def " in source:  # The others are tables.
            yield strip_prose(source)


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def _mixed(name: str) -> tuple[int, str]:
    # Another checksum than the one that says whether a file is held out.
    return zlib.adler32(name.encode()) % 9973, name
