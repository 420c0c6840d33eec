"""Configurations read from YAML and the command line, and the help of their options.

Every field's help stands in its metadata; `peft-jax train --help` prints it.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_jax.core.options import ConfigError
from peft_jax.core.select import nearest
from peft_jax.core.where import REQUIRED
from peft_jax.methods import METHODS
from peft_jax.recipes.plan import planned
from peft_jax.recipes.run_config import RunConfig, checked, element_of, section_in
from peft_jax.training.method import method_options


def load_config(path: str | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file with `key.sub=value` overrides. Raises ConfigError with one
    sentence.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"configuration file {path} does not exist{_config_hint(file)}")
        try:
            tree = _yaml(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is not valid YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} should hold a mapping of options")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree)


_RESOLVERS = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:int"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its integers of base 60, so that 2:4 is a pattern and not 124."""

    yaml_implicit_resolvers = _RESOLVERS


_INTEGER = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _config_hint(file: Path) -> str:
    return (
        nearest(file.name, [p.name for p in file.parent.glob("*.yaml")])
        if file.parent.is_dir()
        else ""
    )


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} should read key=value")
    try:
        value = _yaml(text) if text else None
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        tree = _within(tree, parent, override)
    place: Any = _index(tree, last) if isinstance(tree, list) else last
    tree[place] = value


def _within(tree: Any, name: str, override: str) -> Any:
    """The section `name` of a tree, or the item of that number of a list."""
    if isinstance(tree, list):
        at = _index(tree, name)
        if isinstance(tree[at], str):  # a stage by its name
            tree[at] = {"name": tree[at]}
        return tree[at]
    part = tree.setdefault(name, {})
    if not isinstance(part, dict | list):
        raise ConfigError(f"override {override!r}: {name} is no section")
    return part


def _index(items: list[Any], name: str) -> int:
    """The place that a number of an override names in a list."""
    if not name.isdecimal() or int(name) >= len(items):
        raise ConfigError(f"{name!r} is none of the {len(items)} numbers from 0 of this list")
    return int(name)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from nested mappings. Raises ConfigError with one sentence."""
    config = checked(tree)
    planned(config)
    return config


def describe() -> list[tuple[str, str, str]]:
    """(option, default, help) for every option, methods' included."""
    rows: list[tuple[str, str, str]] = []

    def walk(section: Any, prefix: str) -> None:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            name = prefix + field.name
            if dataclasses.is_dataclass(value):
                walk(value, name + ".")
                continue
            rows.append((name, _shown(value), field.metadata.get("help", "")))
            kind = section_in(type(section), field.name)
            inner: Any = element_of(kind) or kind
            if dataclasses.is_dataclass(inner):
                walk(
                    typing.cast(type, inner)(),
                    f"{name}." + {list: "N.", dict: "NAME."}.get(typing.get_origin(kind), ""),
                )

    walk(RunConfig(), "")
    return rows + _describe_methods()


def _describe_methods() -> list[tuple[str, str, str]]:
    """The same for options of methods; one that several have in common is said once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for method in METHODS:
        for name, o in method_options(method).items():
            default = "required" if o.default is REQUIRED else _shown(o.default)
            found.setdefault((f"method.{name}", default, o.help), []).append(method)
    return [
        (name, default, f"{text} ({', '.join(of) if len(of) < 7 else f'{len(of)} methods'})")
        for (name, default, text), of in found.items()
    ]


def _shown(value: Any) -> str:
    return (
        ""
        if value is None
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    )
