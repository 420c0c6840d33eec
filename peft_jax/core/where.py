"""The options of methods: those that many share, declared once, and how they are read.

A method's function has options of its own as keyword arguments, each `Annotated[type, help]`, and
takes one of the groups below as `**where: Unpack[Where]`. `Selection.of` gives them their values.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, TypedDict, Unpack

from peft_jax.core.select import Targets, nearest
from peft_jax.core.weight import Layout

REQUIRED = inspect.Parameter.empty
Bias = Literal["none", "all", "lora_only"]


class Named(TypedDict, total=False):
    """Of a method that is an adapter."""

    adapter: Annotated[str, "the adapter's name"]


class Embedded(Named, total=False):
    """Of a method that stands at the tokens' embedding."""

    embedding: Annotated[str | None, "the tokens' embedding, where there are several"]


class Excluding(TypedDict, total=False):
    """Of a method that has targets of its own."""

    exclude: Annotated[Targets, "what the targets name and is left out"]


class Vectors(Named, Excluding, total=False):
    """Of a method that trains biases or norms."""


class Among(Named, Excluding, total=False):
    """Of a method that has targets of its own, and acts on some of the layers."""

    layers: Annotated[Sequence[int] | None, "numbers of the layers that get it; by default all"]
    layout: Annotated[Layout | None, "which axes of a weight are inputs, from layout_of(model)"]


class Modules(Among, total=False):
    """Of a method that stands beside modules."""

    width: Annotated[int | None, "features of modules without a kernel; by default the model's"]


class Saved(Named, total=False):
    """Of a method beside which modules may train whole."""

    modules_to_save: Annotated[Targets, "modules that train whole beside it"]


class Beside(Among, Saved, total=False):
    """Of a method that changes weights, with targets of its own."""


class Where(Beside, total=False):
    """Of a method that changes weights: where, and what trains beside it."""

    targets: Annotated[Targets, "what gets it: names, globs, re:..., or all-linear"]


class Biased(Where, total=False):
    """Of a method beside which biases may train."""

    bias: Annotated[Bias, "biases that train too: none, all, or lora_only, those of the targets"]


class Trained(Excluding, total=False):
    """Of a method that trains weights themselves."""

    targets: Annotated[Targets, "what gets it: names, globs, re:..., or all-linear"]
    layout: Annotated[Layout | None, "which axes of a weight are inputs, from layout_of(model)"]
    bias: Annotated[Bias, "biases that train too: none, all, or lora_only, those of the targets"]
    modules_to_save: Annotated[Targets, "modules that train whole beside it"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The values of a group's options, and the defaults of those that were not given."""

    targets: Targets = "all-linear"
    exclude: Targets = ()
    layers: Sequence[int] | None = None
    layout: Layout | None = None
    modules_to_save: Targets = ()
    bias: Bias = "none"
    adapter: str = "default"
    width: int | None = None
    embedding: str | None = None

    @classmethod
    def of(cls, method: Callable[..., Any], where: Mapping[str, Any], **own: Any) -> Self:
        """The options `where` of a method's function, with those that it declares itself.

        Raises TypeError for one that the function does not have, naming the nearest.
        """
        known = options_of(method)
        for name in where:
            if name not in known:
                raise TypeError(
                    f"{method.__name__}() has no option {name!r}.{nearest(name, known)} "
                    f"Its options: {', '.join(known)}"
                )
        return cls(**{**where, **own})

    def aimed(self, targets: Targets) -> Self:
        """The same with other targets."""
        return dataclasses.replace(self, targets=targets)

    @property
    def places(self) -> dict[str, Any]:
        """What the selector goes by."""
        names = ("targets", "exclude", "layers", "layout")
        return {name: getattr(self, name) for name in names}


class Option(NamedTuple):
    """A keyword argument: its type, its default (`REQUIRED` where there is none) and its help."""

    annotation: Any
    default: Any
    help: str


@functools.cache
def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """name -> option of a function: its keyword arguments, and those of the group that it takes."""
    hints = typing.get_type_hints(function, include_extras=True)
    found: dict[str, Option] = {}
    for p in inspect.signature(function).parameters.values():
        hint = hints.get(p.name, Any)
        if p.kind is p.KEYWORD_ONLY:
            found[p.name] = _option(hint, p.default)
        elif p.kind is p.VAR_KEYWORD and typing.get_origin(hint) is Unpack:
            group = typing.get_type_hints(typing.get_args(hint)[0], include_extras=True)
            values = {f.name: f.default for f in dataclasses.fields(Selection)}
            found |= {n: _option(group[n], value) for n, value in values.items() if n in group}
    return found


def _option(hint: Any, default: Any) -> Option:
    if typing.get_origin(hint) is not Annotated:
        return Option(hint, default, "")
    kind, *texts = typing.get_args(hint)
    return Option(kind, default, next((t for t in texts if isinstance(t, str)), ""))
