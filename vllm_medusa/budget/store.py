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

    """

    model_config = ConfigDict(frozen=True)

    verification: Curve
    proposal: Curve

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


def costs_file(directory: Path, parts: Mapping[str, str]) -> Path:
    """Return the file for an engine that these parts describe: all on which its steps' times depend."""
    description = repr(sorted(parts.items()))
    return directory / f"{hashlib.sha256(description.encode()).hexdigest()[:16]}.json"
