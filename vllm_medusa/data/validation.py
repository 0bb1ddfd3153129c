# SPDX-License-Identifier: Apache-2.0
"""Validate user input with pydantic models and report errors in one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_medusa.messages import shortened

Model = TypeVar("Model", bound=BaseModel)

MAX_ERRORS = 3
"""How many errors one message lists."""


def validated(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """Return a validated model, or raise ``ValueError`` with the first errors in one line."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        errors = error.errors()[:MAX_ERRORS]
        raise ValueError("; ".join(_describe(kind, dict(detail)) for detail in errors)) from None


def _describe(kind: type[BaseModel], detail: Mapping[str, Any]) -> str:
    place = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place, kind.model_fields, n=1)
        known = f"did you mean {close[0]}?" if close else f"known settings: {', '.join(sorted(kind.model_fields))}"
        return f"unknown setting {place}; {known}"
    if detail["type"] == "missing":
        field = kind.model_fields.get(place)
        return f"{place} is missing" + (f": {field.description}" if field and field.description else "")
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]}, got {shortened(detail['input'])}" if place else message
