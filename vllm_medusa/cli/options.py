# SPDX-License-Identifier: Apache-2.0
"""Create command-line options from the fields of a pydantic model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def with_options_of(*models: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of models.

    The command's parameter ``settings`` gets the options that were given, by field name and as typed; the models parse
    and validate them. An option for a field of several values may be repeated.
    """
    fields = {name: field for model in models for name, field in model.model_fields.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        options = [_option(name, field) for name, field in fields.items()]

        def run(**values: Any) -> None:
            settings = {name: values.pop(name) for name in fields}
            command(**values, settings={name: value for name, value in settings.items() if value not in (None, [])})

        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def settings_of(model: type[BaseModel], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are fields of a model."""
    return {name: value for name, value in settings.items() if name in model.model_fields}


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind: Any = str
    if field.annotation is bool:
        kind = bool
    elif get_origin(field.annotation) is tuple:
        kind = list[str]
    # As help, since typer puts the text of a default that it does not know itself into parentheses.
    text = " ".join(filter(None, (field.description, _default(name, field))))
    option = typer.Option(help=text, metavar=_metavar(field), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _default(name: str, field: FieldInfo) -> str | None:
    """Return what the help says of a field's default, in click's form; None where the description says it."""
    if field.is_required() or field.default is None or field.default == ():
        return None
    if isinstance(field.default, bool):
        shown = name.replace("_", "-") if field.default else f"no-{name.replace('_', '-')}"
    else:
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        shown = ", ".join(map(str, values))
    return f"[default: {shown}]"


def _metavar(field: FieldInfo) -> str | None:
    """Return a field's choices, or the name of its type."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if kind is bool:
        return None
    if isinstance(kind, type):
        choices = [str(choice) for choice in kind] if hasattr(kind, "__members__") else []
        return "|".join(choices) or {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
    return "|".join(str(choice) for choice in get_args(kind))
