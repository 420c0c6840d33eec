"""Options: frozen dataclasses that are the same in Python, in YAML and on the command line.

A field says its default, a line of help, and whether it alters what comes of a run.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


class ConfigError(ValueError):
    """A configuration that cannot be used, in one sentence."""


@typing.dataclass_transform(frozen_default=True)
def configuration(cls: type) -> Any:
    """A frozen dataclass whose values are checked and which refuses unknown fields."""
    return dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)


def option(default: Any, text: str, *, alters: bool = True) -> Any:
    """A field with a default and a line of help. `alters` says whether another value makes another
    result, so that a run that has begun cannot go on with it.
    """
    metadata = {"help": text, "alters": alters}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def dotted(section: type, prefix: str = "", alters: bool = True) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it alters the result) of each option of a section. Sections that may be
    absent, and lists of them, are one option.
    """
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name, counts = prefix + field.name, alters and field.metadata.get("alters", True)
        if dataclasses.is_dataclass(kind := hints[field.name]):
            yield from dotted(typing.cast(type, kind), name + ".", counts)
        else:
            yield name, counts


def settings_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, as JSON has it, of each option that alters the result."""
    tree = json.loads(json.dumps(dataclasses.asdict(section)))

    def value(name: str) -> Any:
        at = tree
        for part in name.removeprefix(prefix).split("."):
            at = at[part]
        return at

    return {name: value(name) for name, counts in dotted(type(section), prefix) if counts}
