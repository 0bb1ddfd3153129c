# SPDX-License-Identifier: Apache-2.0
"""Keep to a checkpoint's directory: what its files name may come from strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_medusa.files import read_json
from vllm_medusa.messages import shortened

SUFFIXES = (".safetensors", ".bin", ".pt")
"""Suffixes of the files that an index may name."""


def indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names, sorted by name.

    Raises:
        ValueError: it is no index, or names something that is not a weight file in its directory.
        OSError: the index cannot be read.

    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is no index of weights, it has no weight_map of names; download it again")
    return [_named_file(index, name) for name in sorted(set(map(_as_name, weight_map.values())))]


def require_inside(path: Path) -> None:
    """Raise ``ValueError`` if a file of a checkpoint is a link that leaves the checkpoint's directory."""
    directory = path.parent.resolve()
    # In the Hub's cache a snapshot's files are links into a folder beside all snapshots.
    root = directory.parents[1] if directory.parent.name == "snapshots" else directory
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path} is a link that leaves {root}; put the file itself there")


def _as_name(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _named_file(index: Path, name: str) -> Path:
    path = index.parent / name
    if Path(name).name != name or path.suffix not in SUFFIXES:
        raise ValueError(
            f"{index} names {shortened(name)}; it may only name files in its directory that end with "
            f"{', '.join(SUFFIXES)}; download it again"
        )
    if not path.exists():
        raise ValueError(f"{index} names {name}, which is not there; the download is incomplete, download it again")
    require_inside(path)
    return path
