"""Training as a stage of a run: a method, with or without teachers, by the one loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.core.options import ConfigError, configuration, option, settings_of
from peft_jax.core.partition import count, freeze
from peft_jax.core.stage import Context, Stage, State
from peft_jax.data import fingerprint
from peft_jax.distillation.objective import of_student
from peft_jax.models.tables import check_rows, first_position
from peft_jax.objectives.reading import Objective
from peft_jax.quantization.stage import QuantizeConfig
from peft_jax.training.config import OptimizerConfig, TrainConfig
from peft_jax.training.data import DataConfig, Subject
from peft_jax.training.lesson import DistillConfig, Lesson, check_distill, distills, lesson
from peft_jax.training.loop import Result, train
from peft_jax.training.method import (
    add_method,
    check_loftq,
    check_method,
    ends_otherwise,
    is_loftq,
    name_of,
)
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.report import active_parameters, step_flops_per_token
from peft_jax.training.rows import make_rows
from peft_jax.training.tasks import objective_of


@configuration
class Training:
    """What a training stage is made of: sections of the configuration. `quantize` is the format of
    a base that the method itself quantizes (LoftQ).
    """

    method: dict[str, Any] = option({"name": "lora"}, "the method's name and its options")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "the optimizer")
    train: TrainConfig = option(TrainConfig(), "the training loop")
    distill: DistillConfig = option(DistillConfig(), "learning from teachers")
    quantize: QuantizeConfig = option(QuantizeConfig(), "what LoftQ makes of the base")


class Interrupted(Exception):
    """A signal ended training early; `result` is what it came to."""

    def __init__(self, result: Result, folder: Path) -> None:
        super().__init__(stopped(result, folder))
        self.result = result


def stopped(result: Result, folder: Path) -> str:
    """What is said of a run that a signal ended."""
    return (
        f"stopped at step {result.step} by SIGTERM; the checkpoint is in {folder / 'checkpoints'}"
    )


class Prepared(NamedTuple):
    """What is trained: the tree with the method in it, the rows, the number of steps, the
    objective, how a student is taught, and what identifies all this.
    """

    params: Any
    rows: Any
    steps: int
    objective: Objective
    taught: Lesson | None
    identity: dict[str, Any]


def check_training(section: Training) -> None:
    """Raise ConfigError for values that cannot be."""
    t = section.train
    positive = {
        "train.batch_size": t.batch_size,
        "train.accumulate": t.accumulate,
        "train.log_every": t.log_every,
        "train.keep_checkpoints": t.keep_checkpoints,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"option {name!r} must be at least 1, got {value}")
    if t.batch_size % t.accumulate:
        raise ConfigError(
            f"train.batch_size={t.batch_size} is not a multiple of train.accumulate={t.accumulate}"
        )
    if t.steps is not None and t.steps < 0:
        raise ConfigError(f"option 'train.steps' must not be negative, got {t.steps}")
    check_method(section.method)
    if (t.patience or (t.eval_every and t.keep_best)) and ends_otherwise(section.method):
        raise ConfigError(
            f"method {name_of(section.method)} is done at the last step only: set "
            "train.keep_best=false and train.patience=0, since an earlier evaluation is one of "
            "another model"
        )
    if is_loftq(section.method):
        check_loftq(section.quantize)
    check_distill(section.distill)


def passes(data: DataConfig, loop: TrainConfig) -> int:
    """How often the rows of data.train are among those trained on: as often as they are to be seen
    where others are replayed, so that these are not the same ones each time.
    """
    return 1 if data.replay is None or loop.steps is not None else max(1, round(loop.epochs))


def train_steps(loop: TrainConfig, rows: Any, times: int = 1) -> int:
    """The number of optimizer steps over rows that hold the data `times` times."""
    if loop.steps is not None:
        return loop.steps
    wanted = round(loop.epochs / times * len(rows.tokens), 6)
    return max(1, math.ceil(wanted / loop.batch_size))  # every row of the last epoch is seen


def prepare(section: Training, state: State, context: Context) -> Prepared:
    """The tree with the method in it, and what it learns from and how."""
    subject, model = context.subject(state.model), state.model
    data, loop = subject.data, section.train
    rows = make_rows(subject, data.train)
    params = add_method(
        section.method,
        freeze(state.params) if state.trained else state.params,
        subject,
        rows,
        base_format=section.quantize,
        masked=state.mask_updates if loop.mask_updates is None else loop.mask_updates,
    )
    steps = train_steps(loop, rows, subject.passes)
    taught = None
    if distills(section.distill):
        taught = lesson(section.distill, subject, params, rows, context.teacher)
    trained, total = count(params)
    context.say(
        f"{model.config.model_type} model, {total:,} parameters, {trained:,} trained "
        f"({trained / total:.2%}); "
        f"{len(rows.tokens):,} rows of {data.sequence_length} tokens; {steps:,} steps"
    )
    check_rows(model, rows, before=first_position(params))
    said = {"data": fingerprint(rows), **({} if taught is None else taught.identity)}
    identity = {**context.past.identity, **said}
    return Prepared(params, rows, steps, objective_of(subject), taught, identity)


def validation_rows(made: Prepared, subject: Subject) -> Any:
    """The rows that are evaluated on during training; None where there are none."""
    source = subject.data.validation
    rows = None if source is None else make_rows(subject, source)
    check_rows(subject.model, rows, before=first_position(made.params))
    return rows


def fit(
    section: Training, state: State, context: Context, made: Prepared, validation: Any
) -> Result:
    """Train what was prepared, in the context's folder."""
    taught, past = made.taught, context.past
    result = train(
        state.model,
        made.params if taught is None else taught.params,
        made.rows if taught is None else taught.rows,
        make_optimizer(section.optimizer, made.steps, section.method),
        section.train,
        steps=made.steps,
        mesh=context.mesh,
        validation=validation,
        objective=made.objective if taught is None else taught.objective,
        evaluation=None if taught is None else of_student(made.objective),
        folder=context.folder,
        resume=past.resume,
        identity=made.identity,
        resume_with=past.resume_with,
        flops_per_token=None if taught is None else _flops(state.model, made.params, taught),
        console=context.console,
    )
    return result if taught is None else result._replace(params=result.params["student"])


def _flops(model: Any, student: Any, taught: Lesson) -> float:
    """Of a student's step, and of a forward pass through each teacher, for one token."""
    return step_flops_per_token(*active_parameters(model, student)) + 2.0 * taught.judged


def numbers_of(result: Result, params: Any) -> dict[str, Any]:
    """What training tells of itself; `params` is the tree that trained."""
    trained, total = count(params)
    return {
        "trained_parameters": trained,
        "parameters": total,
        "steps": result.step,
        "skipped_steps": result.skipped,
    }


def _run(section: Training, state: State, context: Context) -> State:
    made = prepare(section, state, context)
    validation = validation_rows(made, context.subject(state.model))
    result = fit(section, state, context, made, validation)
    if result.interrupted:
        raise Interrupted(result, context.folder)
    numbers = numbers_of(result, made.params)
    return state.replace(params=result.params, trained=True, numbers=numbers)


def _identity(section: Training) -> dict[str, Any]:
    """The base's format is the method's own affair with LoftQ only."""
    found = settings_of(section) | {"method": {"name": "lora", **section.method}}
    if is_loftq(section.method):
        return found
    return {name: value for name, value in found.items() if not name.startswith("quantize.")}


STAGE = Stage(
    "train",
    "training of a method",
    Training,
    _run,
    sections=("method", "optimizer", "train", "distill", "quantize"),
    check=check_training,
    identity=_identity,
)
