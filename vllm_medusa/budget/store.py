# SPDX-License-Identifier: Apache-2.0
"""Measured costs on disk, so that an engine that has run on a machine before starts at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from vllm_medusa.budget.cost import Curve
from vllm_medusa.files import replaced_file


class Costs(BaseModel):
    """What an engine's steps take.

    Attributes:
        verification: a step of the target, by its rows.
        proposal: the heads and their tree, by requests.
        engine: whose steps these are, by the parts that ``costs_file`` takes.

    """

    model_config = ConfigDict(frozen=True)

    verification: Curve
    proposal: Curve
    engine: dict[str, str] = {}

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read what ``write`` wrote; None if there is no such file, or none that can be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            WriteError: it cannot be written.

        """
        with replaced_file(path) as stream:
            stream.write(self.model_dump_json(indent=1))


def costs_directory(cache_root: str) -> Path:
    """Return where costs are kept under vLLM's cache root."""
    return Path(cache_root) / "medusa" / "costs"


def costs_file(directory: Path, parts: Mapping[str, str]) -> Path:
    """Return the file for an engine that these parts describe: all on which its steps' times depend."""
    description = repr(sorted(parts.items()))
    return directory / f"{hashlib.sha256(description.encode()).hexdigest()[:16]}.json"


def find_costs(directory: Path, parts: Mapping[str, str]) -> Costs | None:
    """Return the latest costs of an engine of which these parts are true; None if there are none."""
    for path in sorted(directory.glob("*.json"), key=lambda each: each.stat().st_mtime, reverse=True):
        costs = Costs.read(path)
        if costs is not None and parts.items() <= costs.engine.items():
            return costs
    return None


def name_of(model: str) -> str:
    """Return what costs call a model: a directory by its full path, a repository as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
