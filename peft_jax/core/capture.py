"""What goes into and comes out of a model's modules, captured while it runs through `bind`.

    apply = bind(model)
    logits, found = capture(apply, {"hidden": output_of("model/layers")})(params, tokens)

A place is a module's path without layer numbers, or a glob; what stacked or looped layers give is
one array with the layers first.
"""

from __future__ import annotations

import contextvars
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.roles import stack_names
from peft_jax.core.select import number_layers

CAPTURED = "captured"  # the collection of Flax variables


class Place(NamedTuple):
    """A module's path, as "model/layers/self_attn", and what to take of a call of it: (arguments,
    output) -> array.
    """

    path: str
    pick: Callable[[tuple[Any, ...], Any], jax.Array]


class _Input(NamedTuple):
    """Takes a module's input, or a field of it; a value, so that programs of equal places are
    one.
    """

    number: int
    field: str | None

    def __call__(self, args: tuple[Any, ...], out: Any) -> jax.Array:
        given = args[self.number]
        return given if self.field is None else getattr(given, self.field)


def _first_output(args: tuple[Any, ...], out: Any) -> jax.Array:
    return out[0] if isinstance(out, tuple) else out


def output_of(path: str) -> Place:
    """A module's output, or the first of several."""
    return Place(path, _first_output)


def input_of(path: str, index: int = 0, *, field: str | None = None) -> Place:
    """A module's input, by its number, or what is called `field` in it."""
    return Place(path, _Input(index, field))


def plain_path(path: str) -> str:
    """A path without the numbers of layers."""
    return _layer(stack_names()).sub(r"\1", number_layers(path))


@functools.lru_cache(maxsize=8)
def _layer(stacks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(stacks)})/(\d+)\b")


class Recorder:
    """What a binding calls for each module's call while something is captured."""

    def __init__(self, wanted: Mapping[str, Place]) -> None:
        self.wanted = wanted
        self.found: dict[str, dict[int, Any]] = {}
        self.where: dict[str, str] = {}

    def wants(self, path: str) -> bool:
        """Whether anything is wanted of the module at this path."""
        return any(
            fnmatch.fnmatchcase(plain_path(path), place.path) for place in self.wanted.values()
        )

    def of(self, path: str, args: tuple[Any, ...], out: Any) -> dict[str, jax.Array]:
        """name -> array of what is wanted of a call of the module at this path."""
        plain = plain_path(path)
        return {
            n: place.pick(args, out)
            for n, place in self.wanted.items()
            if fnmatch.fnmatchcase(plain, place.path)
        }

    def put(self, name: str, path: str, value: Any) -> None:
        """Keep what a call of the module at this path gave."""
        numbered, plain = _layer(stack_names()).search(number_layers(path)), plain_path(path)
        if self.where.setdefault(name, plain) != plain:
            raise ValueError(
                f"{self.wanted[name].path!r} names several modules: {self.where[name]} and {plain}"
            )
        self.found.setdefault(name, {})[int(numbered[2]) if numbered else -1] = value

    def result(self) -> dict[str, jax.Array]:
        """name -> array, looped layers stacked. Raises ValueError for a place that gave nothing."""
        for name, place in self.wanted.items():
            if name not in self.found:
                raise ValueError(
                    f"nothing was captured at {place.path!r}: no module called there, or its "
                    "nn.scan does not carry the "
                    f"collection {CAPTURED!r} (variable_axes={{'params': 0, '{CAPTURED}': 0}})"
                )
        return {name: self._joined(parts) for name, parts in self.found.items()}

    @staticmethod
    def _joined(parts: dict[int, Any]) -> Any:
        return parts[-1] if -1 in parts else jnp.stack([parts[i] for i in sorted(parts)])


RECORDER: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


def capture(apply: Callable[..., Any], wanted: Mapping[str, Place]) -> Callable[..., Any]:
    """`run(params, *args, **kwargs) -> (what apply returns, name -> array)` for the result of
    `bind`.

    Layers stacked under `nn.scan` give arrays [L, ...], looped ones (`layers_0`, ...) too; a stack
    under `nnx.scan` is not seen into. Raises ValueError where nothing is at a path.
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        recorder = Recorder(wanted)
        token = RECORDER.set(recorder)
        try:
            out = apply(params, *args, **kwargs)
        finally:
            RECORDER.reset(token)
        return out, recorder.result()

    return run
