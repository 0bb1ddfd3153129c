# SPDX-License-Identifier: Apache-2.0
"""The manifest of a generated training set: its settings and inputs and, once it is finished, its contents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_medusa.files import replaced_file, sha256_of
from vllm_medusa.versions import installed_versions

MANIFEST_FILE = "manifest.json"


class Counts(BaseModel):
    """The size of a finished set.

    Attributes:
        prompts: valid lines of the input files.
        records: lines of the shards; prompts that got no answer have none.
        tokens: tokens of all answers.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompts: int
    records: int
    tokens: int


class Manifest(BaseModel):
    """The content of ``manifest.json``.

    Attributes:
        settings: the settings on which the shards depend.
        inputs: the input files' names and SHA-256 checksums, in order.
        command: the command that started the run.
        versions: the package versions at the start.
        finished: whether all shards are written.
        counts: the set's size, once it is finished.
        shards: the shards' names and SHA-256 checksums, once the set is finished.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    settings: dict[str, Any]
    inputs: tuple[tuple[str, str], ...]
    command: tuple[str, ...]
    versions: dict[str, str]
    finished: bool = False
    counts: Counts | None = None
    shards: dict[str, str] = {}

    @classmethod
    def of_run(cls, settings: Mapping[str, Any], files: Sequence[Path], command: Sequence[str]) -> Manifest:
        return cls(
            settings=json.loads(json.dumps(settings)),  # Tuples become lists, as in a manifest that was read.
            inputs=tuple((file.name, sha256_of(file)) for file in files),
            command=tuple(command),
            versions=installed_versions(),
        )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a directory's manifest; raises ``ValueError`` if it is invalid, ``OSError`` if there is none."""
        path = directory / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no manifest of a training set: {str(error).splitlines()[0]}") from None

    def write(self, directory: Path) -> None:
        with replaced_file(directory / MANIFEST_FILE) as stream:
            stream.write(self.model_dump_json(indent=2) + "\n")

    def begin_in(self, directory: Path) -> Manifest:
        """Start a run in a directory, or resume the one that was started there.

        Returns:
            The manifest of the resumed run, or this one.

        Raises:
            ValueError: the directory holds a run with other settings or inputs, or other files.
            OSError: the directory cannot be written.

        """
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / MANIFEST_FILE).exists():
            begun = Manifest.read(directory)
            self._require_same(begun, directory)
            return begun
        if any(path.name != f".{MANIFEST_FILE}.tmp" for path in directory.iterdir()):
            raise ValueError(f"{directory} holds files but no {MANIFEST_FILE}; give an empty or a new directory")
        self.write(directory)
        return self

    def _require_same(self, begun: Manifest, directory: Path) -> None:
        for name in self.settings.keys() | begun.settings.keys():
            there, here = begun.settings.get(name), self.settings.get(name)
            if there != here:
                raise ValueError(
                    f"{directory} was begun with {name} {json.dumps(there)}, now it is {json.dumps(here)}; "
                    f"give the former {name}, or another directory"
                )
        if begun.inputs != self.inputs:
            there, here = (
                ", ".join(f"{name} ({digest[:12]})" for name, digest in each) for each in (begun.inputs, self.inputs)
            )
            raise ValueError(
                f"{directory} was begun with the input files {there} (SHA-256), now they are {here}; "
                "give those files as they were, or another directory"
            )
