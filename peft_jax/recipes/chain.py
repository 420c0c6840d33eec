"""A run of listed stages. Each leaves its result in a folder of its own, atomically, so that a run
that was killed goes on with the first unfinished stage (within a training stage from its newest
checkpoint) and comes to the same end.

    output/stages/0-base.json              what the model measures before
    output/stages/1-prune/state/           the first stage's result, once it is finished
    output/stages/1-prune/results.json     and what it measures
    output/stages/2-train/checkpoints/     a training stage's own records, as without stages

A stage goes on with what the one before has written, also where that has just been done.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from peft_jax.core.files import write_json
from peft_jax.core.options import ConfigError, settings_of
from peft_jax.core.sharding import shard
from peft_jax.core.stage import Past, State
from peft_jax.hub import load_tokenizer, local_folder
from peft_jax.hub.state import read_identity, read_state, write_state
from peft_jax.recipes.export import export, save_model, write_config
from peft_jax.recipes.measure import held_rows, measure, samples_of, show_samples, shown
from peft_jax.recipes.plan import Entry, planned
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, context_of, mesh_of, opened
from peft_jax.training.checkpoint import fingerprint
from peft_jax.training.loop import Result, check_batch
from peft_jax.training.resume import refusal
from peft_jax.training.stage import Interrupted

FOLDER, STATE, NUMBERS, BASE = "stages", "state", "results.json", "0-base.json"


class Place(NamedTuple):
    """A stage with its folder, and what a run that goes on must have in common with it."""

    entry: Entry
    folder: Path
    identity: dict[str, Any]

    @property
    def finished(self) -> bool:
        return (self.folder / STATE).is_dir()


@dataclasses.dataclass
class Chain:
    """A run's stages, and the state after the one that was last looked at: `held` of number `at`.

    `setup` has no state of its own.
    """

    config: RunConfig
    setup: Setup
    places: list[Place]
    console: Console
    at: int = -1
    held: State | None = None
    rows: Any = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def after(self, number: int) -> Setup:
        """The model after a stage, which must be finished, and before all of them after 0."""
        if self.at != number or self.held is None:
            self.held = None  # so that one state at a time is held
            self.held = self._read(number)
            self.at = number
        return self.setup._replace(state=self.held)

    def _read(self, number: int) -> State:
        if number == 0:
            return opened(self.config).state
        model, mesh = self.config.model, self.setup.mesh

        def place(params: Any) -> Any:
            return params if mesh is None else shard(params, mesh)

        folder = self.places[number - 1].folder / STATE
        return read_state(folder, place, remat=model.remat, attention=model.attention)

    def run(self, number: int) -> None:
        """Run a stage and write its result."""
        entry, folder, identity = self.places[number - 1]
        self.say(f"stage {entry.label}{_needed(entry)}")
        past = Past(self.config.resume, self.config.resume_with, identity)
        setup = self.after(number - 1)
        context = context_of(
            entry.config, setup, entry, console=self.console, folder=folder, past=past
        )
        state = entry.stage.run(entry.section, setup.state, context)
        self.held = None
        write_state(folder / STATE, state, identity)

    def measured(self, number: int) -> dict[str, Any]:
        """What the model measures after a stage, kept beside its result."""
        first, last = number == 0, number == len(self.places)
        home = Path(self.config.output) / FOLDER
        path = home / BASE if first else self.places[number - 1].folder / NUMBERS

        def make() -> dict[str, Any]:
            setup = self.after(number)
            self.rows = held_rows(self.config, setup) if self.rows is None else self.rows
            metrics = measure(self.config, setup, setup.params, self.rows)
            samples = samples_of(self.config, setup, setup.params) if first or last else []
            return {"metrics": metrics, "samples": samples, **setup.state.numbers}

        return _kept(path, make)


def _needed(entry: Entry) -> str:
    """What a stage takes from the data, in words."""
    needs = entry.stage.needs(entry.section)
    what = f", {', '.join(needs.statistics)}" if needs.statistics else ""
    return f": {needs.batches} batches of the training data{what}" if needs.batches else ""


def run_chain(config: RunConfig, console: Console) -> Result:
    """All stages that are not finished, one after the other; what the model measures before and
    after each; and the last one's model, or adapter and base.
    """
    chain, out = chain_of(config, console), Path(config.output)
    _check(chain)
    out.mkdir(parents=True, exist_ok=True)
    write_config(config, out)
    told = {"0-base": chain.measured(0)}
    _say(chain, told)
    for number, place in enumerate(chain.places, 1):
        if not place.finished:
            try:
                chain.run(number)
            except Interrupted as signal:
                chain.say(str(signal))
                return signal.result
        told[place.entry.label] = chain.measured(number)
        _say(chain, told)
    first, last = told["0-base"], told[chain.places[-1].entry.label]
    samples = {"before": first["samples"], "after": last["samples"]}
    show_samples(chain.say, config, samples)
    written = _write(chain, out)
    if jax.process_index() == 0:
        numbers = {"before": first["metrics"], "after": last["metrics"], "samples": samples}
        write_json(out / "results.json", {**numbers, "stages": told})
    leave_report(config)
    chain.say(f"written: {written}")
    params = chain.after(len(chain.places)).params
    return Result(params, last.get("steps", 0), {}, False, last.get("skipped_steps", 0))


def _say(chain: Chain, told: dict[str, dict[str, Any]]) -> None:
    label, numbers = list(told.items())[-1]
    if numbers["metrics"]:
        chain.say(f"{label}: {shown(numbers['metrics'])}")


def chain_of(config: RunConfig, console: Console) -> Chain:
    """The chain of a configuration; no model is loaded."""
    folder = local_folder(config.model.path, config.model.revision)
    base, home = fingerprint(folder), Path(config.output) / FOLDER
    places = [
        Place(entry, home / entry.label, {"settings": _settings(entry), "base": base})
        for entry in planned(config)
    ]
    nothing: Any = None
    setup = Setup(nothing, load_tokenizer(folder), mesh_of(config), folder)
    return Chain(config, setup, places, console)


def finished(config: RunConfig) -> Setup:
    """The model after the last stage. Raises ConfigError where it is not finished."""
    chain = chain_of(config, Console(quiet=True))
    last = chain.places[-1]
    if not last.finished:
        raise ConfigError(
            f"the stage {last.entry.label} in {config.output} is not finished; run "
            "`peft-jax train` first"
        )
    return chain.after(len(chain.places))


def _settings(entry: Entry) -> dict[str, Any]:
    """Dotted name -> value of what alters a stage's result: of the model, the data, and its own."""
    config = entry.config
    common = settings_of(config.model, "model.") | settings_of(config.data, "data.")
    rows = {"train.seed": config.train.seed, "train.batch_size": config.train.batch_size}
    return {**common, **rows, **entry.stage.settings(entry.section)}


def _check(chain: Chain) -> None:
    """Raise ValueError where the folder holds what cannot be gone on with: of other stages, or of
    other options; with resume=false it is taken away.
    """
    config, home = chain.config, Path(chain.config.output) / FOLDER
    for run in (config, *(place.entry.config for place in chain.places)):
        check_batch(run.train, run.data.sequence_length, chain.setup.mesh)
    if not config.resume:
        if jax.process_index() == 0:
            shutil.rmtree(home, ignore_errors=True)
        return
    wanted = {place.entry.number: place for place in chain.places}
    there = sorted(p.name for p in home.iterdir() if p.is_dir()) if home.is_dir() else []
    open_one: str | None = None
    for place in chain.places:
        if place.finished:
            _check_place(place, open_one, config)
        elif open_one is None:
            open_one = place.entry.label
    for name in there:
        number = name.partition("-")[0]
        place = wanted.get(int(number)) if number.isdecimal() else None
        if place is not None and place.entry.label != name:
            raise ValueError(
                f"{home} holds the stage {name}, and stages.{place.entry.number - 1} is "
                f"{place.entry.stage.name} now; set it back, use another output or resume=false"
            )


def _check_place(place: Place, open_one: str | None, config: RunConfig) -> None:
    """Raise ValueError for a finished stage of other options, or after one that is unfinished."""
    if open_one is not None:
        raise ValueError(
            f"{place.folder} is finished, and the stage {open_one} before it is not; remove it, "
            "use another output or resume=false"
        )
    then = read_identity(place.folder / STATE)
    what = f"the stage in {place.folder}"
    if why := refusal(then, place.identity, config.resume_with, what):
        raise ValueError(why)


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The numbers in a file, which are made and written where it is not there."""
    if not path.is_file():
        made = make()
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, made)
        else:
            return made
    return json.loads(path.read_text(encoding="utf-8"))


def _write(chain: Chain, out: Path) -> Path:
    """The last stage's model, or the adapter that it trained with the base that it lies over."""
    last, number = chain.places[-1].entry, len(chain.places)
    params = chain.after(number).params
    if last.stage.name != "train":
        save_model(chain.after(number), params, out)
        return out / "model"
    before = chain.after(number - 1)
    return export(last.config, before, params, out, changed=number > 1)
