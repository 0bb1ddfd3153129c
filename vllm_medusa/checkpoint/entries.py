# SPDX-License-Identifier: Apache-2.0
"""What the entries of a heads' ``config.json`` may be: checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vllm_medusa.files import read_json
from vllm_medusa.messages import shortened

PUBLISHED_NAMES = {"medusa_num_heads": "num_heads", "medusa_num_layers": "num_hidden_layers"}
"""The original repository's keys, and vLLM 0.32's names for them."""

HYDRA_HEADS = "hydra_num_heads"
"""What only the ``config.json`` of published Hydra heads has (arXiv 2402.05109)."""

MOST_HEADS = 64
MOST_LAYERS = 64
MOST_TOKENS = 2**24
MOST_WIDTH = 2**20
MOST_TEMPERATURE = 100
MOST_MATCHED = 8
"""``tree.lookup.LONGEST_MATCH``."""

PathName = Annotated[str, Field(pattern=r"^[0-9]{1,4}(,[0-9]{1,4})*$")]
"""Ranks from the root down, such as ``"0,2"``."""

Weight = Annotated[float, Field(ge=0, lt=1)]


class _Entries(BaseModel):
    """Types and bounds; each description says what an entry must be."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    num_heads: int | None = Field(None, ge=1, le=MOST_HEADS, description=f"an integer from 1 to {MOST_HEADS}")
    num_hidden_layers: int = Field(1, ge=1, le=MOST_LAYERS, description=f"an integer from 1 to {MOST_LAYERS}")
    hidden_size: int | None = Field(None, ge=0, le=MOST_WIDTH, description=f"an integer from 0 to {MOST_WIDTH}")
    vocab_size: int | None = Field(None, ge=0, le=MOST_TOKENS, description=f"an integer from 0 to {MOST_TOKENS}")
    truncated_vocab_size: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description=f"an integer from 0 to {MOST_TOKENS}"
    )
    original_lm_head: bool = Field(False, description="true or false")
    medusa_fc_bias: bool = Field(False, description="true or false")
    sequential_path_rank: int | None = Field(
        None, ge=1, le=MOST_WIDTH, description=f"an integer from 1 to {MOST_WIDTH}"
    )
    logit_scale: float = Field(1.0, gt=0, le=1e6, description="a number above 0")
    medusa_tree: str | list[Any] | None = Field(None, description='a tree: a name such as "sparse", or a list')
    medusa_accuracies: list[Any] | None = Field(
        None, description="a list of each head's accuracies, calibrate the heads again"
    )
    medusa_path_accuracies: dict[PathName, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        description='shares of paths such as {"0": 0.5, "0,2": 0.1}, each after its parent\'s and no larger, '
        "calibrate the heads again",
    )
    medusa_temperatures: list[Annotated[float, Field(gt=0, le=MOST_TEMPERATURE)]] | None = Field(
        None, description=f"one number above 0, at most {MOST_TEMPERATURE}, for each head, calibrate the heads again"
    )
    medusa_lookup_weights: list[Annotated[list[Weight], Field(min_length=1, max_length=MOST_MATCHED)]] | None = Field(
        None,
        description=f"for each head a list of 1 to {MOST_MATCHED} numbers from 0 to less than 1, "
        "calibrate the heads again",
    )
    quantization_config: None = Field(None, description="left out: heads are served in the target's dtype, unquantised")

    @field_validator("medusa_temperatures", "medusa_lookup_weights")
    @classmethod
    def _one_for_each_head(cls, stored: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        heads = info.data.get("num_heads")
        if stored is not None and heads is not None and len(stored) != heads:
            raise ValueError("not one for each head")
        return stored

    @field_validator("medusa_path_accuracies")
    @classmethod
    def _after_its_parents(cls, accuracies: dict[str, float] | None) -> dict[str, float] | None:
        known: dict[tuple[int, ...], float] = {(): 1.0}
        for path, share in paths_of(accuracies or {}).items():
            if share > known.get(path[:-1], -1.0):
                raise ValueError("not after its parent's, or larger")
            known[path] = share
        return accuracies


def paths_of(accuracies: Mapping[str, float]) -> dict[tuple[int, ...], float]:
    """Read the keys of ``medusa_path_accuracies``."""
    return {tuple(map(int, name.split(","))): share for name, share in accuracies.items()}


def path_name(path: Iterable[int]) -> str:
    """Return the key of a path in ``medusa_path_accuracies``."""
    return ",".join(map(str, path))


def check_entries(stored: Any, where: str) -> dict[str, Any]:
    """Return a ``config.json``'s content if every entry that is read has its type and is within its bounds.

    Args:
        stored: the file's content.
        where: what holds it, for the message.

    Raises:
        ValueError: an entry is wrong; the message is one line that names it.

    """
    if not isinstance(stored, dict):
        raise ValueError(f"{where} holds {shortened(stored)}, not an object; download it again")
    refuse_hydra(stored, where)
    keys = {PUBLISHED_NAMES.get(key, key): key for key in stored}
    try:
        _Entries.model_validate({name: stored[key] for name, key in keys.items()})
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        must = _Entries.model_fields[name].description
        raise ValueError(f"{where} has {keys[name]} {shortened(stored[keys[name]])}; it must be {must}") from None
    return stored


def refuse_hydra(stored: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` for published Hydra heads, whose layers are of another kind than ``training.paths``."""
    if HYDRA_HEADS in stored:
        raise ValueError(
            f"{where} has {HYDRA_HEADS} {shortened(stored[HYDRA_HEADS])}: published Hydra heads, whose layers cannot "
            "be read; train heads that read their path with vllm-medusa train --path-rank"
        )


def read_entries(path: Path) -> dict[str, Any]:
    """Read and check a heads' ``config.json``; raises ``ValueError``, or ``OSError`` if it cannot be read."""
    return check_entries(read_json(path), str(path))


def has_heads(stored: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a number of heads, as only one of heads does."""
    return any(PUBLISHED_NAMES.get(key, key) == "num_heads" for key in stored)
