"""From a configuration to a model: loaded, and changed by the stages that make its base."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from peft_jax.core.mesh import make_mesh
from peft_jax.core.roles import register_roles, roles_from
from peft_jax.core.sharding import check_rules
from peft_jax.core.stage import Batches, Context, Needs, Past, State
from peft_jax.data.source import SourceConfig
from peft_jax.data.templates import template_of
from peft_jax.hub import load_tokenizer, local_folder
from peft_jax.hub.checkpoint import read_config
from peft_jax.hub.model import ModelConfig, open_model
from peft_jax.models.families import task_of
from peft_jax.recipes.plan import Entry, before_training
from peft_jax.recipes.run_config import RunConfig, settings
from peft_jax.recipes.stages import STAGES
from peft_jax.training.checkpoint import fingerprint
from peft_jax.training.data import Subject
from peft_jax.training.lesson import Loaded, TeacherConfig
from peft_jax.training.rows import first_batches, make_rows, read_source, text_rows
from peft_jax.training.stage import passes
from peft_jax.training.tasks import TASKS, objective_of, wanted_labels

logger = logging.getLogger("peft_jax")


class Setup(NamedTuple):
    """A model with its tree, its tokenizer, the mesh, if there is one, and the folder that it is
    of.
    """

    state: State
    tokenizer: Any
    mesh: Mesh | None
    folder: Path

    @property
    def model(self) -> Any:
        return self.state.model

    @property
    def params(self) -> Any:
        return self.state.params


def start_distributed() -> None:
    """Join the other hosts where a launcher (TPU pod, SLURM, JAX_COORDINATOR_ADDRESS) started
    several.
    """
    several = (
        os.environ.get("JAX_COORDINATOR_ADDRESS") or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    )
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    if not (several or pod) or jax.distributed.is_initialized():
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given: dict[str, Any] = {k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
    jax.distributed.initialize(**given)


def describe_model(config: RunConfig) -> None:
    """Make known what the configuration says of a model's modules and how its weights are split.

    Raises ValueError for a role and a mesh axis that there are none of.
    """
    roles, rules = config.model.roles or {}, config.sharding
    if not (roles or rules):
        return
    specs = [
        (pattern, PartitionSpec(*(tuple(a) if isinstance(a, list) else a for a in axes)))
        for pattern, axes in rules.items()
    ]
    check_rules(specs)
    register_roles(roles_from(f"configuration {roles} {rules}", roles, rules=tuple(specs)))


def mesh_of(config: RunConfig) -> Mesh | None:
    """The mesh that the configuration describes, with what it says of how weights lie on it; none
    on one device unless it is asked for.
    """
    describe_model(config)
    return make_mesh(config.mesh) if config.mesh or jax.device_count() > 1 else None


def set_up(config: RunConfig, console: Console | None = None) -> Setup:
    """The base of a configuration that lists no stages: loaded onto its mesh, with what its
    sections ask for before training.
    """
    return based(config, before_training(config), console or Console())


def based(config: RunConfig, entries: Sequence[Entry], console: Console) -> Setup:
    """The model loaded, and changed by these stages. What the first one does to arrays as soon as
    they are read is done then, so that the whole model is never held.
    """
    first = None
    if entries and not config.model.fresh and (as_read := entries[0].stage.as_read) is not None:
        first = as_read(entries[0].section, config.train.seed)
    setup = opened(config, None if first is None else first[0])
    if first is not None:
        first[1](setup.params)
    for entry in entries if first is None else entries[1:]:
        context = context_of(entry.config, setup, entry, console=console)
        setup = setup._replace(state=entry.stage.run(entry.section, setup.state, context))
    return setup


def opened(config: RunConfig, each: Any = None) -> Setup:
    """The model as it is, and what it takes to use it."""
    mesh, folder = mesh_of(config), local_folder(config.model.path, config.model.revision)
    model, params = open_model(
        config.model,
        folder,
        labels=_labels(config, folder),
        mesh=mesh,
        seed=config.train.seed,
        each=each,
    )
    state = State(model, params, mask_updates=STAGES["prune"].section_of(config).mask_updates)
    return Setup(state, tokenizer_in(config, folder), mesh, folder)


def tokenizer_in(config: RunConfig, folder: Path) -> Any:
    """The tokenizer of a folder, with the chat template that the configuration names."""
    tokenizer = load_tokenizer(folder)
    if config.data.template is not None:
        tokenizer.chat_template = template_of(tokenizer, config.data.template).source
    return tokenizer


def _labels(config: RunConfig, folder: Path) -> Sequence[str] | int | None:
    """The classes that the head is to have: the configured ones, the checkpoint's own (None), or
    the training data's.
    """
    data = config.data
    if data.labels:
        return data.labels
    hf_config = read_config(folder)
    task = task_of(hf_config, config.model.task)
    if TASKS[task].labels is None:
        return None
    known = None
    if task_of(hf_config) == task:
        names = hf_config.id2label
        known = 1 if len(names) == 1 else [names[i] for i in sorted(names)]
    records = read_source(data, data.train, task, config.train.seed)
    return wanted_labels(task, records, known, data.label_kind)


def subject_of(config: RunConfig, model: Any, tokenizer: Any, mesh: Mesh | None) -> Subject:
    """A model with the data of a configuration, as tasks see it."""
    loop = config.train
    return Subject(
        model,
        tokenizer,
        config.data,
        loop.batch_size,
        mesh,
        loop.seed,
        loop.loss_chunk,
        loop.router_loss,
        passes(config.data, loop),
        loop.objective,
        loop.objective_options,
    )


def subject_in(config: RunConfig, setup: Setup) -> Subject:
    """The model of a setup with the data of a configuration."""
    return subject_of(config, setup.model, setup.tokenizer, setup.mesh)


def context_of(
    config: RunConfig,
    setup: Setup,
    entry: Entry | None = None,
    *,
    console: Console,
    folder: Path | None = None,
    past: Past | None = None,
    needs: Needs | None = None,
) -> Context:
    """What a stage has beside its section and the state, with the batches that it needs."""
    if needs is None:
        needs = Needs() if entry is None else entry.stage.needs(entry.section)

    def subject(model: Any) -> Subject:
        return subject_of(config, model, setup.tokenizer, setup.mesh)

    return Context(
        tokenizer=setup.tokenizer,
        mesh=setup.mesh,
        seed=config.train.seed,
        folder=Path(config.output) if folder is None else folder,
        console=console,
        objective=lambda model: objective_of(subject(model)),
        subject=subject,
        teacher=lambda teacher, student: teacher_of(config, teacher, student),
        batches=_batches(config, subject(setup.model), needs),
        past=past or Past(),
    )


def _batches(config: RunConfig, subject: Subject, needs: Needs) -> Batches:
    """The batches of the training rows, or of other texts, that a stage needs."""
    if not needs.batches:
        return []
    if not needs.texts:
        return calibration_batches(config, subject, needs.batches)
    replay = config.data.replay
    rows = make_rows(subject, config.data.train) if replay is None else text_rows(subject, replay)
    return first_batches(subject, rows, needs.batches)


def calibration_batches(config: RunConfig, subject: Subject, count: int) -> Batches:
    """The first batches of the training rows. It is said where a model of the user's is calibrated
    on the default training data, which nobody chose for it.
    """
    train = config.data.train
    if train == SourceConfig() and not config.model.path.startswith("builtin:"):
        logger.warning(
            "calibrating on %s, which data.train is by default: statistics of text unlike what the "
            "model is to read can do "
            "worse than none (3-bit GPTQ worse than nearest); set data.train.path to text of the "
            "model's use",
            train.path,
        )
    return first_batches(subject, make_rows(subject, train), count)


def teacher_of(config: RunConfig, teacher: TeacherConfig, student: Any = None) -> Loaded:
    """A teacher, loaded as the configuration has it for the student: onto the same mesh, and, given
    the student's model, for the same task and classes.
    """
    labels: list[str] = []
    if student is not None and TASKS[student.task].labels:
        labels = list((json.loads(student.config.hf_config).get("id2label") or {}).values())
    model = ModelConfig(
        path=teacher.path,
        revision=teacher.revision,
        adapter=teacher.adapter,
        dtype=teacher.dtype or config.model.dtype,
        task=None if student is None else student.task,
        scan_layers=config.model.scan_layers,
        attention=config.model.attention,
    )
    data = dataclasses.replace(config.data, labels=labels)
    own = dataclasses.replace(config, model=model, quantize=teacher.quantize, data=data)
    stages = [STAGES[name] for name in ("quantize", "adapter")]
    asked = [s for s in stages if s.asked(s.section_of(own))]
    entries = [Entry(i, s, own) for i, s in enumerate(asked, 1)]
    setup = based(own, entries, Console(quiet=True))
    return Loaded(setup.model, setup.params, setup.tokenizer, setup.folder)


def identity(config: RunConfig, setup: Setup) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues it, but for what is known
    of its rows and teachers.
    """
    base = fingerprint(setup.folder)
    return {"settings": settings(config), "base": base, "task": setup.model.task}
