"""`peft-jax train`: measure, train, measure, write what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from peft_jax.core.files import write_json
from peft_jax.core.stage import Past
from peft_jax.models.tables import check_rows, first_position
from peft_jax.recipes.chain import run_chain
from peft_jax.recipes.export import CHECKPOINTS, export, write_config
from peft_jax.recipes.measure import measure, samples_of, show_samples, shown
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, context_of, identity, set_up, subject_in
from peft_jax.training.checkpoint import Checkpoints
from peft_jax.training.loop import Result, check_batch
from peft_jax.training.rows import make_rows
from peft_jax.training.stage import STAGE, fit, numbers_of, prepare, stopped, validation_rows


def run_training(
    config: RunConfig, console: Console | None = None, setup: Setup | None = None
) -> Result:
    """The whole of `peft-jax train`: samples and evaluation before, training, both again, and the
    export; of a configuration that lists stages, all of them (`run_chain`).

    A `setup` that there is already is taken as it is.
    """
    console = console or Console()
    console.quiet = console.quiet or jax.process_index() != 0
    if config.stages:
        return run_chain(config, console)
    setup = set_up(config, console) if setup is None else setup
    out, section = Path(config.output), STAGE.section_of(config)
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    past = Past(config.resume, config.resume_with, identity(config, setup))
    context, subject = (
        context_of(config, setup, console=console, past=past),
        subject_in(config, setup),
    )
    made = prepare(section, setup.state, context)
    validation = validation_rows(made, subject)
    test = make_rows(subject, config.data.test) if config.data.test else validation
    check_rows(setup.model, test, before=first_position(made.params))
    _open_output(config, out, made.identity)
    write_config(config, out)
    before = measure(config, setup, setup.params, test)
    samples = {"before": samples_of(config, setup, setup.params)}
    if before:
        context.say(f"before: {shown(before)}")
    result = fit(section, setup.state, context, made, validation)
    if result.interrupted:
        context.say(stopped(result, out))
        return result
    after = measure(config, setup, result.params, test)
    if after:
        context.say(f"after:  {shown(after)}")
    samples["after"] = samples_of(config, setup, result.params)
    show_samples(context.say, config, samples)
    exported = export(config, setup, result.params, out)
    numbers = numbers_of(result, made.params)
    if jax.process_index() == 0:
        told = {"before": before, "after": after, "samples": samples, **numbers}
        write_json(out / "results.json", told)
    leave_report(config)
    context.say(f"written: {exported}{_skipped(result)}")
    return result


def _skipped(result: Result) -> str:
    if not result.skipped:
        return ""
    return f"; {result.skipped} of {result.step} steps skipped, whose gradient was not finite"


def _open_output(config: RunConfig, out: Path, who: Mapping[str, Any]) -> None:
    """The folder to write to: refused where it holds another run that is to be continued, and
    without a run's records where a new one begins. Nothing is written or taken away before.
    """
    if config.resume and (out / CHECKPOINTS).is_dir():
        there = Checkpoints(
            out / CHECKPOINTS,
            keep=config.train.keep_checkpoints,
            identity=dict(who),
            resume_with=config.resume_with,
        )
        try:
            there.check()
        finally:
            there.close()
    elif not config.resume and jax.process_index() == 0:
        for name in (CHECKPOINTS, "best", "metrics.jsonl", "tensorboard"):
            remove(out / name)
    out.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Take away a file or folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
