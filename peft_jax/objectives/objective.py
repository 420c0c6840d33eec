"""The records of objectives that a configuration names (`train.objective`).

Each stands at the end of a file of this package, as `OBJECTIVE`; another package offers its own as
an entry point of the group `peft_jax.objectives`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_jax.core.registry import Registry
from peft_jax.objectives.reading import Objective


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NamedObjective:
    """An objective by its `name`, and the `tasks` of models that it is for.

    `make(reading, **options)` gives it. One that `reads` is over distributions, and gets how the
    task reads a batch; another one gets None, and is for models without such a reading (numbers,
    pairs of texts).
    `follows` is the paper that it is held to and `example` the options that the matrix takes.
    `reference(outputs, batch)` gives the loss of what the model puts out (logits [B, T, V] or
    [B, C], or hidden states [B, T, D]), computed in NumPy; the matrix fails one without.
    """

    name: str
    tasks: tuple[str, ...]
    make: Callable[..., Objective]
    follows: str
    reads: bool = True
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference: Callable[[np.ndarray, Mapping[str, np.ndarray]], float] | None = None


OBJECTIVES: Registry[NamedObjective] = Registry(
    "objective", ("peft_jax.objectives",), "OBJECTIVE", "peft_jax.objectives"
)


def make_objective(name: str, task: str, reading: Any, options: Mapping[str, Any]) -> Objective:
    """The objective called `name` for a model of a task that reads batches by `reading`.

    Raises ValueError for an unknown name, another task's objective, and options that it lacks.
    """
    record = OBJECTIVES.find(name)
    if task not in record.tasks:
        own = [o.name for o in OBJECTIVES.values() if task in o.tasks]
        raise ValueError(
            f"the objective {name!r} is for {' and '.join(record.tasks)} models, and this is a "
            f"{task} model. Those for it: {', '.join(own) or 'none'}"
        )
    if record.reads != (reading is not None):
        has, wants = ("numbers", "distributions") if record.reads else ("distributions", "numbers")
        raise ValueError(f"the objective {name!r} is over {wants}, and this model gives {has}")
    try:
        return record.make(reading, **options)
    except TypeError as error:
        raise ValueError(f"the objective {name!r} cannot be made of {dict(options)}") from error
