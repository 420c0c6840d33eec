"""The training step of a configuration as a compiled program, without a parameter in memory: for
devices that need not be there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.mesh import batch_sharding, make_mesh
from peft_jax.core.options import ConfigError
from peft_jax.core.partition import partition
from peft_jax.core.program import Program, read_program
from peft_jax.core.sharding import shardings
from peft_jax.core.stage import State
from peft_jax.hub import local_folder
from peft_jax.hub.model import planned_model
from peft_jax.models.blocks import fresh_params
from peft_jax.recipes.plan import before_training
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, context_of, describe_model, subject_of
from peft_jax.training.loop import check_batch, state_shardings
from peft_jax.training.method import add_method, check_method
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.stage import STAGE, Training
from peft_jax.training.step import init_state, make_step
from peft_jax.training.tasks import objective_of

_ROWS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
}


class Planned(NamedTuple):
    """A training step, and the shapes, dtypes and places of what it is given; `params` is the whole
    tree.
    """

    step: Any
    params: Any
    state: Any
    frozen: Any
    batch: Any
    model: Any

    def lower(self) -> Any:
        """The step, lowered."""
        return self.step.lower(self.state, self.frozen, self.batch)


def planned_step(config: RunConfig, mesh: Mesh, *, segments: bool = True) -> Planned:
    """The step that `peft-jax train` compiles for this configuration, on `mesh`.

    Of `model.path` the config alone is read. `segments=False` is for rows of one text each, without
    segments. Raises ConfigError where a stage before training needs data, for chains of stages and
    teachers, and for tasks other than causal language models.
    """
    _check(config)
    describe_model(config)
    section, length = STAGE.section_of(config), config.data.sequence_length
    check_batch(config.train, length, mesh)
    folder = local_folder(config.model.path, config.model.revision)
    model = planned_model(config.model, folder)
    if model.task != "causal_lm":
        raise ConfigError(f"only steps of causal language models are planned, not of {model.task}")
    model, params = _tree(config, section, model)
    params = _placed(params, shardings(params, mesh))
    optimizer = make_optimizer(section.optimizer, config.train.steps or 1000, section.method)
    trainable, frozen = partition(params)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, 0), trainable)
    state = _placed(state, state_shardings(params, optimizer, mesh))
    rows = (config.train.batch_size, length)
    names = [n for n in _ROWS if segments or n not in ("positions", "segment_ids")]
    batch = {n: jax.ShapeDtypeStruct(rows, _ROWS[n]) for n in names}
    batch = _placed(batch, {n: batch_sharding(mesh, x) for n, x in batch.items()})
    objective = objective_of(subject_of(config, model, None, None))
    step = make_step(objective, bind(model), optimizer, accumulate=config.train.accumulate)
    return Planned(jax.jit(step, donate_argnums=0), params, state, frozen, batch, model)


def _check(config: RunConfig) -> None:
    if config.stages or config.distill.teachers:
        raise ConfigError(
            "the step of a chain of stages, or of one that learns from teachers, is not planned: "
            "plan each training with a configuration of its own"
        )


def _tree(config: RunConfig, section: Training, model: Any) -> tuple[Any, Any]:
    """(the model that trains, the shapes and dtypes of its tree with the method in it)."""
    check_method(section.method)
    trained: list[Any] = []

    def make() -> Any:
        state = State(model, fresh_params(model, config.train.seed))
        for entry in before_training(config):
            if entry.stage.needs(entry.section).batches:
                raise ConfigError(
                    f"{entry.stage.name} takes statistics of the data, which a planned step has "
                    "none of: plan it with options that need none"
                )
            setup = Setup(state, None, None, local_folder(config.model.path))
            context = context_of(entry.config, setup, entry, console=Console(quiet=True))
            state = entry.stage.run(entry.section, state, context)
        trained.append(state.model)
        subject = subject_of(config, state.model, None, None)
        return add_method(section.method, state.params, subject, base_format=section.quantize)

    params = jax.eval_shape(make)
    return trained[-1], params


def _placed(tree: Any, places: Any) -> Any:
    def put(x: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(put, tree, places)


class Compiled(NamedTuple):
    """A planned step as it was compiled: bytes a device of its arguments and of its temporaries,
    what it does, and its text.
    """

    planned: Planned
    arguments: int
    temporaries: int
    program: Program
    text: str


def compiled_for(config: RunConfig, topology: str, *, segments: bool = True) -> Compiled:
    """The step of a configuration, compiled for a TPU topology that need not be there (needs the
    package `libtpu`), as "v5e:4x4".
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    planned = planned_step(config, make_mesh(config.mesh, devices), segments=segments)
    compiled = planned.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        planned,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        read_program(text),
        text,
    )


def describe_program(compiled: Compiled, rows: int = 12) -> str:
    """What a compiled step takes and does, for a person."""
    program = compiled.program
    kernels = ", ".join(f"{name} x {n}" for name, n in sorted(program.kernels.items()))
    lines = [
        f"arguments {compiled.arguments / 2**30:.2f} GiB, temporaries "
        f"{compiled.temporaries / 2**30:.2f} GiB a device",
        f"kernels: {kernels or 'none'}",
        f"products: {program.flops / 1e12:.2f} TFLOP a device, kernels left out",
        f"moved between devices: {program.moved / 1e9:.2f} GB a device",
    ]
    for c in sorted(program.collectives, key=lambda c: -c.bytes)[:rows]:
        lines.append(f"{c.bytes / 1e9:10.3f} GB  {c.kind} {c.type} x {c.times}  {c.source}")
    return "\n".join(lines)
