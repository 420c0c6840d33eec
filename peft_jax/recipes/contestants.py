"""The runs of a comparison: each recipe as an ordinary run of `peft-jax train`, with a seed, a
learning rate and a folder of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.core.options import ConfigError
from peft_jax.core.registry import nearest
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.plan import changed
from peft_jax.recipes.run_config import RunConfig, settings, to_dict
from peft_jax.recipes.sections import CompareConfig

RUNS, RECORD = "runs", "record.json"


class Contestant(NamedTuple):
    """One run: of a recipe, with a seed, at a learning rate (None for its configuration's)."""

    recipe: str
    seed: int
    rate: float | None
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def finished(self) -> bool:
        return (self.folder / RECORD).is_file()

    @property
    def identity(self) -> dict[str, Any]:
        """What a record must have in common with the run that it is taken for."""
        own = {**settings(self.config), "stages": self.config.stages}
        return {"settings": own, **held_out(self.config)}


def held_out(config: RunConfig) -> dict[str, Any]:
    """What a model is measured on, by the options' names, as JSON has it."""
    tree = to_dict(config)
    data = {f"data.{name}": tree["data"][name] for name in ("validation", "test")}
    found = {**data, "evaluate": tree["evaluate"], "generate": tree["generate"]}
    return json.loads(json.dumps(found))


def measuring(config: RunConfig) -> dict[str, Any]:
    """How a comparison measures, by the options' names, as JSON has it."""
    c = to_dict(config)["compare"]
    names = ("quality", "forgetting", "own_texts", "own_tokens")
    names += ("generate_rows", "generate_tokens")
    return held_out(config) | {f"compare.{name}": c[name] for name in names}


def check_comparison(config: RunConfig) -> None:
    """Raise ConfigError for a comparison that cannot be."""
    c = config.compare
    if not c.recipes:
        raise ConfigError("compare needs compare.recipes, as in configs/compare/quickstart.yaml")
    for name, of in (("compare.reference", [c.reference]), ("compare.only", c.only)):
        if unknown := [n for n in of if n not in c.recipes]:
            raise ConfigError(
                f"option {name!r}: {unknown[0]!r} is no recipe.{nearest(unknown[0], c.recipes)} "
                f"Recipes: {', '.join(c.recipes)}"
            )
    if not c.seeds or len(set(c.seeds)) < len(c.seeds):
        raise ConfigError("option 'compare.seeds' needs seeds, each of them once")
    if c.devices < 1:
        raise ConfigError(f"option 'compare.devices' must be at least 1, got {c.devices}")
    counts = {name: len(set(r.rates)) for name, r in c.recipes.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(
            f"recipes have different numbers of learning rates to try ({said}): give each as many "
            "compare.recipes.NAME.rates, or none"
        )
    if any(counts.values()) and config.data.validation is None:
        raise ConfigError("learning rates are chosen by the loss on data.validation: give one")
    for name, recipe in c.recipes.items():  # all of them, before the first one runs
        rates = {other: (r.rates or [None])[0] for other, r in c.recipes.items()}
        for rate in recipe.rates or [None]:
            contestant(config, name, c.seeds[0], rate, rates)


def contestant(
    config: RunConfig, name: str, seed: int, rate: float | None, rates: Mapping[str, float | None]
) -> Contestant:
    """The run of a recipe. `rates` are those of the recipes that it builds on. Raises ConfigError
    with the recipe's name.
    """
    plain = dataclasses.replace(config, compare=CompareConfig())
    before = list(config.compare.recipes)[: list(config.compare.recipes).index(name)]
    folders = {other: str(folder_of(config, other, seed, rates.get(other))) for other in before}
    try:
        differs = _filled(config.compare.recipes[name].run, folders, config.compare.recipes)
        tree = changed(RunConfig, to_dict(plain), differs)
        tree["output"] = str(folder_of(config, name, seed, rate))
        tree["train"] = {**tree["train"], "seed": seed}
        if rate is not None:
            tree["optimizer"] = {**tree["optimizer"], "learning_rate": rate}
        return Contestant(name, seed, rate, parse_config(tree))
    except ConfigError as error:
        raise ConfigError(f"compare.recipes.{name}.run: {error}") from error


def folder_of(config: RunConfig, name: str, seed: int, rate: float | None) -> Path:
    """As runs/compare/runs/lora/seed-0, with -rate-0.01 where rates are tried."""
    end = "" if rate is None else f"-rate-{rate:g}"
    return Path(config.output) / RUNS / name / f"seed-{seed}{end}"


def _filled(value: Any, folders: Mapping[str, str], recipes: Mapping[str, Any]) -> Any:
    """A tree of options whose texts name folders of other recipes' runs."""
    if isinstance(value, Mapping):
        return {k: _filled(v, folders, recipes) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, folders, recipes) for v in value]
    if not isinstance(value, str):
        return value

    def folder(found: re.Match[str]) -> str:
        name = found[1]
        if name in recipes and name not in folders:
            raise ConfigError(f"{value!r} names the recipe {name}, which does not come before it")
        return folders.get(name, found[0])

    return re.sub(r"\{(\w+)\}", folder, value)


def builds_on(config: RunConfig, name: str) -> set[str]:
    """The recipes that a recipe's options name."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, Mapping | list):
            for inner in value.values() if isinstance(value, Mapping) else value:
                look(inner)
        elif isinstance(value, str):
            found.update(n for n in re.findall(r"\{(\w+)\}", value) if n in config.compare.recipes)

    look(config.compare.recipes[name].run)
    return found
