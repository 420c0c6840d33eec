"""`peft-jax compare`: recipes on one task, each with several seeds, and a report of them.

    output/base.json                        what the base measures before
    output/runs/lora/seed-0-rate-0.01/      a run, as `peft-jax train` leaves it
    output/runs/lora/seed-0-rate-0.01/record.json     what it measures, once it is finished
    output/report.html, .md, .json, .csv

A comparison that was stopped goes on with the first run that has no record, and within it with
what the run has left.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from peft_jax.core.files import read_json, write_json
from peft_jax.core.options import ConfigError, settings_of
from peft_jax.core.partition import count
from peft_jax.data.source import SourceConfig
from peft_jax.recipes.assess import (
    device_bytes,
    layers_of,
    loss_on,
    remove_states,
    stored_parameters,
    tokens_per_second,
    write_own_texts,
)
from peft_jax.recipes.chain import finished
from peft_jax.recipes.contestants import (
    RECORD,
    RUNS,
    Contestant,
    builds_on,
    check_comparison,
    contestant,
    measuring,
)
from peft_jax.recipes.measure import held_rows, measure, printer, samples_of, shown
from peft_jax.recipes.run_config import RunConfig, to_dict
from peft_jax.recipes.setup import Setup, opened, set_up
from peft_jax.recipes.spread import run_on_devices
from peft_jax.recipes.train import remove, run_training
from peft_jax.reports.comparison import Comparison, Recipe, write_comparison
from peft_jax.reports.folder import (
    curve,
    numbers,
    rows,
    training_folders,
    weights_bytes,
)
from peft_jax.reports.page import about
from peft_jax.training.checkpoint import fingerprint
from peft_jax.training.loop import check_batch
from peft_jax.training.resume import refusal

BASE, OWN, PROGRAMS = "base.json", "own_texts.jsonl", ".programs"
STATES = ("checkpoints", "best", "state")


class InterruptedComparisonError(Exception):
    """A signal ended a run early; the comparison goes on there."""


def run_comparison(config: RunConfig, console: Console | None = None) -> Path | None:
    """The whole of `peft-jax compare`: all runs that have no record yet, one after the other, and
    the report; None where runs of recipes that were not asked for are missing.

    Raises ConfigError for a comparison that cannot be, ValueError for records of other options.
    """
    check_comparison(config)
    console, out = console or Console(), Path(config.output)
    say, c = printer(console), config.compare
    if not config.resume:
        for name in (RUNS, BASE, OWN):
            remove(out / name)
    out.mkdir(parents=True, exist_ok=True)
    _keep_programs(out)
    if c.devices > 1:
        run_on_devices(config, say)
    base = _base(config, console)
    if c.quality not in base["metrics"]:
        raise ConfigError(
            f"option 'compare.quality': {c.quality!r} is not measured; there are "
            f"{', '.join(base['metrics'])}"
        )
    say(f"the base: {shown(base['metrics'])}")
    try:
        rates = _run_recipes(config, base, console)
    except InterruptedComparisonError as signal:
        say(f"{signal}; the same command goes on there")
        return None
    if waits := [name for name in c.recipes if name not in rates]:
        say(f"the report waits for {', '.join(waits)}")
        return None
    write_comparison(_comparison(config, rates, base), out)
    say(f"written: {out / 'report.html'}")
    return out / "report.html"


class MissingError(Exception):
    """A run that is not asked for has no record."""


def _run_recipes(
    config: RunConfig, base: dict[str, Any], console: Console
) -> dict[str, float | None]:
    """Recipe -> its rate, of all recipes that are finished then. One that builds on another that
    is not is left out.
    """
    c, rates = config.compare, {}
    for name in c.recipes:
        if builds_on(config, name) <= set(rates):
            asked = not c.only or name in c.only
            with contextlib.suppress(MissingError):
                rates[name] = _run_recipe(config, name, rates, base, console, asked=asked)
    return rates


def _keep_programs(out: Path) -> None:
    """Keep compiled programs on disk, so that another seed's run does not compile them again."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str((out / PROGRAMS).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _run_recipe(
    config: RunConfig,
    name: str,
    rates: Mapping[str, float | None],
    base: dict[str, Any],
    console: Console,
    *,
    asked: bool,
) -> float | None:
    """Do the runs of a recipe, and return the rate that was best on the first seed."""
    first, *others = config.compare.seeds
    tried = _tried(config, name, rates)
    for run in tried.values():
        _do(config, run, base, console, asked=asked)
    best = min(tried, key=lambda rate: _or_infinite(validation_loss(tried[rate])))
    for seed in others:
        _do(config, contestant(config, name, seed, best, rates), base, console, asked=asked)
    return best


def _tried(
    config: RunConfig, name: str, rates: Mapping[str, float | None]
) -> dict[float | None, Contestant]:
    """The runs of the first seed, by rate."""
    wanted: list[float | None] = [*dict.fromkeys(config.compare.recipes[name].rates)] or [None]
    first = config.compare.seeds[0]
    return {rate: contestant(config, name, first, rate, rates) for rate in wanted}


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def validation_loss(run: Contestant) -> float | None:
    """The last training's lowest loss on the validation data, which is that of the weights that
    were kept.
    """
    parts = training_folders(run.folder)
    found = [r["loss"] for r in rows(parts[-1], "validation")] if parts else []
    known = [x for x in found if x is not None]
    return (min(known) if run.config.train.keep_best else known[-1]) if known else None


def _do(
    config: RunConfig, run: Contestant, base: dict[str, Any], console: Console, *, asked: bool
) -> None:
    """Run, measure and record, if that is not done yet. Raises ValueError for a record of another
    run.
    """
    say = printer(console)
    if run.finished:
        then = read_json(run.folder / RECORD)["identity"]
        now = _identity(config, run, base)
        if why := refusal(then, now, config.resume_with, f"the run in {run.folder}"):
            raise ValueError(why)
        return
    if not asked:
        raise MissingError(f"{run.folder} has no finished run")
    say(f"\n{run.recipe}, seed {run.seed}{'' if run.rate is None else f', rate {run.rate:g}'}")
    setup, params = _trained(run, console)
    write_json(run.folder / RECORD, _record(config, run, setup, params, base))
    if not config.compare.keep_states:
        remove_states(run.folder, STATES)


def _trained(run: Contestant, console: Console) -> tuple[Setup, Any]:
    """The run's model and its tree at the end."""
    if run.config.stages:
        result = run_training(run.config, console)
        _check_finished(result, run)
        setup = finished(run.config)
        return setup, setup.params
    setup = set_up(run.config, console)
    result = run_training(run.config, console, setup)
    _check_finished(result, run)
    return setup, result.params


def _check_finished(result: Any, run: Contestant) -> None:
    if result.interrupted:
        raise InterruptedComparisonError(f"stopped at step {result.step} of {run.folder}")


def _record(
    config: RunConfig, run: Contestant, setup: Setup, params: Any, base: dict[str, Any]
) -> dict[str, Any]:
    """What is measured of a finished run."""
    told = read_json(run.folder / "results.json")
    metrics, after = told["after"], loss_on(run.config, setup, params, _other_text(config))
    found = numbers(run.folder)
    measured = {
        "quality": metrics[config.compare.quality],
        "forgetting": after - base["other_loss"],
        "kept": stored_parameters(run.folder, params),
        "device": device_bytes(params),
        **{k: found[k] for k in ("trained", "disk", "memory", "flops")},
        **{k: found[k] for k in ("step_seconds", "train_seconds")},
        "tokens_per_second": tokens_per_second(config, setup, params),
    }
    return {
        "identity": _identity(config, run, base),
        "seed": run.seed,
        "rate": run.rate,
        "metrics": metrics,
        "other_loss": after,
        "parameters": count(params)[1],
        "numbers": measured,
        "layers": layers_of(params),
        "samples": told["samples"]["after"],
    }


def _identity(config: RunConfig, run: Contestant, base: dict[str, Any]) -> dict[str, Any]:
    """What a record was made with."""
    return {**measuring(config), **run.identity, "base": base["fingerprint"]}


def _other_text(config: RunConfig) -> SourceConfig:
    own = SourceConfig(path=str(Path(config.output) / OWN))
    return config.compare.forgetting or own


def _base(config: RunConfig, console: Console) -> dict[str, Any]:
    """What the base measures, kept in a file."""
    path, c = Path(config.output) / BASE, config.compare
    identity = {"settings": settings_of(config.model, "model."), **measuring(config)}
    if path.is_file():
        then = read_json(path)
        if why := refusal(then["identity"], identity, config.resume_with, str(path)):
            raise ValueError(why)
        return then
    setup = opened(config)
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    if c.forgetting is None:
        write_own_texts(config, setup, path.with_name(OWN))
    params = setup.params
    made = {
        "identity": identity,
        "fingerprint": fingerprint(setup.folder),
        "metrics": measure(config, setup, params, held_rows(config, setup)),
        "other_loss": loss_on(config, setup, params, _other_text(config)),
        "parameters": count(params)[1],
        "disk": weights_bytes(setup.folder),
        "device": device_bytes(params),
        "bits": next((x["bits"] for x in layers_of(params)), None),
        "tokens_per_second": tokens_per_second(config, setup, params),
        "prompts": list(config.generate.prompts),
        "samples": samples_of(config, setup, params),
    }
    write_json(path, made)
    return read_json(path)


def _runs(config: RunConfig, name: str, rates: Mapping[str, float | None]) -> Iterator[Contestant]:
    """A recipe's runs that count: one for each seed, at the rate that was best."""
    for seed in config.compare.seeds:
        yield contestant(config, name, seed, rates[name], rates)


def _comparison(
    config: RunConfig, rates: Mapping[str, float | None], base: dict[str, Any]
) -> Comparison:
    """Everything that the report says, read from the folder."""
    c = config.compare
    recipes = []
    for name, recipe in c.recipes.items():
        runs = list(_runs(config, name, rates))
        tried = _tried(config, name, rates) if recipe.rates else {}
        kinds = ("train", "validation")
        recipes.append(
            Recipe(
                name,
                recipe.title or name,
                recipe.technique,
                rates[name],
                {f"{rate:g}": validation_loss(run) for rate, run in tried.items()},
                [read_json(run.folder / RECORD) for run in runs],
                {kind: curve(runs[0].folder, kind) for kind in kinds},
            )
        )
    source = c.forgetting
    other = "texts that the base itself writes" if source is None else source.path
    return Comparison(
        f"{Path(config.model.path).name}: {len(recipes)} recipes side by side",
        c.quality,
        c.reference,
        c.seeds,
        other,
        base,
        recipes,
        json.loads(json.dumps(to_dict(config))),
        about(),
    )
