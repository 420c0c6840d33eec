"""Stages: what is done to a model, one after the other, in the order of the user's list.

A stage is a record at the end of the file of its technique, as `STAGE`. It is given its own section
of the configuration, the state that the stage before it left, and a context of few things.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from jax.sharding import Mesh
from rich.console import Console

from peft_jax.core.options import ConfigError, settings_of
from peft_jax.core.sharding import shard

S = TypeVar("S")
Batches = list[dict[str, Any]]
Read = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class State:
    """What a stage hands to the next one: a model, its tree, whether adapters over pruned weights
    are to be masked, and whether the tree holds what has been trained. `numbers` are what the
    stage tells of itself.
    """

    model: Any
    params: Any
    mask_updates: bool = True
    trained: bool = False
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> State:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a stage takes from the training data: batches, and which statistics of them it makes.

    `texts`: batches of other texts (data.replay), where there are some.
    """

    batches: int = 0
    statistics: Sequence[str] = ()
    texts: bool = False


@dataclasses.dataclass(frozen=True)
class Past:
    """What a run that was interrupted left: whether to go on with it, which options may be other
    ones, and what else it must have in common with this one.
    """

    resume: bool = False
    resume_with: Sequence[str] = ()
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage has beside its section and the state.

    `batches` are those that it needs, `folder` is its own, `say` prints a line. `objective` gives
    what training a model minimises, `subject` a model with its data (`training.data.Subject`), and
    `teacher` a teacher that has been loaded for a student (`training.lesson.Loaded`).
    """

    tokenizer: Any
    mesh: Mesh | None
    seed: int
    folder: Path
    console: Console
    objective: Callable[[Any], Any]
    subject: Callable[[Any], Any]
    teacher: Callable[[Any, Any], Any]
    batches: Batches = dataclasses.field(default_factory=list)
    past: Past = Past()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def placed(self, params: Any) -> Any:
        """A tree on the mesh, if there is one."""
        return params if self.mesh is None else shard(params, self.mesh)


def _nothing(section: Any) -> Needs:
    return Needs()


def _whatever(section: Any) -> None:
    """Nothing to check."""


def _always(section: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Stage(Generic[S]):
    """A technique as a step of a run.

    `section` is the class of its options (None where it has none), which stand in the configuration
    under the stage's name, or under those of `sections`: one of them is the section, of several it
    is made. `run(section, state, context)` does it; `needs(section)` says what of the data it
    takes, `check(section)` raises ConfigError for values that cannot be, `asked(section)` tells
    whether a section says that anything is to be done, and `wants` what it lacks where it does not.
    `identity(section)` has the settings that a run that goes on must have too. `as_read(section,
    seed)`, where it can be done so, is (what becomes of each array as soon as it is read, a check
    of the whole tree).
    """

    name: str
    help: str
    section: type[S] | None
    run: Callable[[S, State, Context], State]
    sections: tuple[str, ...] = ()
    needs: Callable[[S], Needs] = _nothing
    check: Callable[[S], Any] = _whatever
    asked: Callable[[S], bool] = _always
    wants: str = ""
    identity: Callable[[S], dict[str, Any]] | None = None
    as_read: Callable[[S, int], tuple[Read, Callable[[Any], None]] | None] | None = None

    def places(self) -> tuple[str, ...]:
        """The sections of the configuration that it reads."""
        return self.sections or ((self.name,) if self.section is not None else ())

    def section_of(self, config: Any) -> S:
        """Its section of a whole configuration."""
        places: Any = {name: getattr(config, name) for name in self.places()}
        if len(places) > 1:
            assert self.section is not None
            return self.section(**places)
        return next(iter(places.values()), typing.cast(S, None))

    def settings(self, section: S) -> dict[str, Any]:
        """Dotted name -> value of what a run that goes on must have too."""
        if self.identity is not None:
            return self.identity(section)
        several = len(self.places()) > 1
        prefix = "" if several else f"{next(iter(self.places()), '')}."
        return {} if section is None else settings_of(section, prefix)

    def require(self, section: S) -> None:
        """Raise ConfigError where the section does not say what is to be done."""
        if not self.asked(section):
            raise ConfigError(f"{self.name} needs {self.wants}")
