"""Spell a frozen dataclass as `name{field=value,...}` and read it back.

One declaration gives the command line, JSON, plan files and cache keys: the spelling is derived from the dataclass fields.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any, TypeVar

from effcompile.core.errors import EffError, unknown

T = TypeVar("T")
_FORM = re.compile(r"^\s*(?P<name>[a-z0-9][a-z0-9_.-]*)\s*(?:\{(?P<body>.*)\})?\s*$", re.DOTALL)


def split(text: str) -> tuple[str, dict[str, Any]]:
    """Split `name{a=1,b=[2,3]}` into the name and its fields; values are Python literals, true, false, or strings."""
    match = _FORM.match(text)
    if match is None:
        raise EffError("EFF-U003", f"cannot read `{text}`", hint="spell it like name{field=value,other=[1,2]}")
    fields: dict[str, Any] = {}
    for part in _parts(match["body"] or ""):
        key, sep, value = part.partition("=")
        if not sep or not key.strip():
            raise EffError(
                "EFF-U003", f"`{part}` in `{text}` is not field=value", hint="spell it like name{field=value}"
            )
        try:
            fields[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            fields[key.strip()] = {"true": True, "false": False}.get(value.strip(), value.strip())
    return match["name"], fields


def _parts(body: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, char in enumerate(body):
        depth += (char in "[({") - (char in "])}")
        if char == "," and depth == 0:
            parts.append(body[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, body[start:]] if part.strip()]


def build(cls: type[T], name: str, fields: dict[str, Any]) -> T:
    """Build the dataclass `cls` from spelled fields; an unknown field is an error with the near matches."""
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in fields:
        if key not in known:
            raise unknown("EFF-U003", f"field of `{name}`", key, known)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return cls(**values)


def spell(name: str, value: object) -> str:
    """Print a dataclass as `name{field=value}`, leaving out fields that have their default."""
    parts = []
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        current = getattr(value, field.name)
        if field.default is not dataclasses.MISSING and current == field.default:
            continue
        parts.append(f"{field.name}={_listed(current)}")
    return name + ("{" + ",".join(parts) + "}" if parts else "")


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
