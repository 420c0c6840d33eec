"""The stages of a run, in order: those that are listed, or those that the sections ask for.

A listed stage is a name, or a mapping of what is different for it from the sections at the top:

    stages:
      - prune
      - train
      - quantize: {format: int4}
      - {name: train, method: {name: lora, rank: 4}, train: {steps: 50}}

Options that are given take the place of the section's; mappings (`method`, `options`) and lists are
replaced as a whole. `name` may be left out where one of the keys is the stage's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_jax.core.options import ConfigError
from peft_jax.core.select import nearest
from peft_jax.core.stage import Stage
from peft_jax.recipes.run_config import RunConfig, checked, is_asked, to_dict
from peft_jax.recipes.stages import ORDER, STAGES
from peft_jax.training.method import is_loftq


class Entry(NamedTuple):
    """A stage of a run: its number, from 1, and the configuration as it is for this stage."""

    number: int
    stage: Stage[Any]
    config: RunConfig

    @property
    def section(self) -> Any:
        """The stage's section."""
        return self.stage.section_of(self.config)

    @property
    def label(self) -> str:
        """As 1-prune."""
        return f"{self.number}-{self.stage.name}"


def planned(config: RunConfig) -> list[Entry]:
    """The stages in order. Raises ConfigError naming a listed one that cannot be."""
    if not config.stages:
        names = [n for n in ORDER if n == "train" or is_asked(config, n)]
        if is_loftq(config.method):  # the method quantizes the base itself
            names = [n for n in names if n != "quantize"]
        return [Entry(i, STAGES[n], config) for i, n in enumerate(names, 1)]
    entries = [_entry(config, i, item) for i, item in enumerate(config.stages)]
    names = [entry.stage.name for entry in entries]
    if config.model.adapter is not None and "adapter" not in names:
        raise ConfigError(
            "model.adapter is put into the model by the stage 'adapter': add it to stages, where "
            "it is to come"
        )
    for i, entry in enumerate(entries):
        starts = entry.stage.name == "train" and is_loftq(entry.config.method)
        if starts and "quantize" in names[:i]:
            raise ConfigError(
                f"stages.{i}: method.init=loftq quantizes the base itself: leave the stage "
                "quantize out"
            )
    return entries


def before_training(config: RunConfig) -> list[Entry]:
    """The stages that make the base, of a configuration that lists none."""
    return [entry for entry in planned(config) if entry.stage.name != "train"]


def without_stages(config: RunConfig, command: str) -> None:
    """Raise ConfigError for a configuration that lists stages, which a command does not run."""
    if config.stages:
        raise ConfigError(
            f"`peft-jax {command}` does one thing: `peft-jax train` runs the stages that are "
            "listed; leave stages out"
        )


def _entry(config: RunConfig, index: int, item: Any) -> Entry:
    where = f"stages.{index}"
    name, changes = _named(where, item)
    stage = STAGES[name]
    known = [*(p for p in stage.places() if p != "model"), "data"]
    for key in changes:
        if key not in known:
            raise ConfigError(
                f"unknown option '{where}.{key}'.{nearest(key, known)} Options of the stage "
                f"{name}: {', '.join(known)}"
            )
    try:
        entry = Entry(index + 1, stage, checked(changed(RunConfig, to_dict(config), changes)))
        stage.require(entry.section)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    read = {s.partition(".")[0] for s in stage.settings(entry.section)}
    if unread := [key for key in changes if key not in read and key != "data"]:
        raise ConfigError(f"{where}.{unread[0]}: this stage {name} has no use for it")
    return entry


def _named(where: str, item: Any) -> tuple[str, dict[str, Any]]:
    """(name, changes) of a listed stage."""
    changes = {"name": item} if isinstance(item, str) else dict(item)
    given = [key for key in changes if key in STAGES]
    if "name" not in changes and len(given) != 1:
        raise ConfigError(
            f"{where} does not say which stage it is: give it a name, one of {', '.join(STAGES)}"
        )
    name = str(changes.pop("name", next(iter(given), "")))
    if name not in STAGES:
        raise ConfigError(
            f"{where}: unknown stage {name!r}.{nearest(name, STAGES)} Stages: {', '.join(STAGES)}"
        )
    if name in changes and not changes[name]:  # as in `merge: {}`
        del changes[name]
    return name, changes


def changed(section: Any, tree: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A section's tree with changes; sections in it are changed, anything else is replaced."""
    fields = {f.name: f for f in dataclasses.fields(section)}
    made = dict(tree)
    for key, value in changes.items():
        inner = fields[key].default if key in fields else None
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping) and made[key]:
            value = changed(type(inner), made[key], value)
        made[key] = value
    return made
