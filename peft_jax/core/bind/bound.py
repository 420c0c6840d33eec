"""What `bind` returns: a model as a pure function of its parameters, and what it can do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol, Self

import jax

from peft_jax.core.mesh import entered_mesh, split_rows


class Run(Protocol):
    """How a bound model is run, hashable: those of equal models are equal.

    `state` is what the model keeps beside its parameters.
    """

    def __call__(self, state: Any, params: Any, *args: Any, **kwargs: Any) -> Any: ...

    def __hash__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Function:
    """The run of a function of the user's own."""

    function: Callable[..., Any]

    def __call__(self, state: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(params, *args, **kwargs)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bound:
    """A bound model: `apply(params, *args, **kwargs)`, as `bind` describes it.

    The fields say what the model can do, so that nobody has to look into it. It is hashable, by
    identity, and a pytree of what the model keeps beside its parameters: a program that is given
    it as an argument has nothing of that baked in. There it has no `model`.
    """

    split: Callable[[], tuple[Run, Any]]  # (how the model is run, its state) as it is now
    arounds: tuple[Callable[..., Any], ...] = ()  # the innermost first; see `wrap`
    model: Any = None
    config: Any = None  # the model's, None where it has none
    dtype: Any = None  # that it computes in, None where it does not say
    hidden_states: bool = False  # it has `hidden` and `unembed`
    cache: bool = False  # it has `empty_cache`, and its call takes and returns a `cache`
    outdates: bool = False  # it has `outdated`
    encoder_decoder: bool = False  # it has `start` and `decode`
    chain: bool = False  # it has `chain`
    experts: bool = False  # it is a mixture of experts
    router_loss: float = 0.0  # the weight of its load-balancing loss
    reads: tuple[str, ...] = ()  # further inputs that a wrapper takes, by name
    programs: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any], **fields: Any) -> Self:
        """A function `apply(params, tokens, ...)` of the user's own, and what it can do."""
        return cls(split=Parts(Function(function), None), **fields)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        run, state = self.split()
        call: Callable[..., Any] = functools.partial(run, state)
        for around in self.arounds:
            call = functools.partial(around, call)
        with entered_mesh(params):
            return call(params, *map(_split, args), **{k: _split(x) for k, x in kwargs.items()})

    def wrap(self, around: Callable[..., Any], **fields: Any) -> Self:
        """This with `around(call, params, *args, **kwargs)` in place of each call."""
        return dataclasses.replace(self, arounds=(*self.arounds, around), **fields)

    def program(self, function: Callable[..., Any], **options: Any) -> Any:
        """`jax.jit(function, **options)`, made once and kept as long as this is.

        `function` is a module's own and is given this as an argument; `options` are hashable.
        """
        key = (function, *sorted(options.items()))
        if key not in self.programs:
            # A function object of its own, so that what is compiled of it is freed with it.
            self.programs[key] = jax.jit(functools.partial(function), **options)
        return self.programs[key]

    def tree_flatten(self) -> tuple[tuple[Any], _Static]:
        """(the model's state, the rest), for JAX."""
        run, state = self.split()
        return (state,), _Static(run, self)

    @classmethod
    def tree_unflatten(cls, static: _Static, children: tuple[Any]) -> Self:
        """The inverse of `tree_flatten`."""
        return dataclasses.replace(static.bound, split=Parts(static.run, children[0]), programs={})


@dataclasses.dataclass(frozen=True)
class Parts:
    """What `Bound.split` gives of a model that does not change."""

    run: Run
    state: Any

    def __call__(self) -> tuple[Run, Any]:
        return self.run, self.state


class _Static:
    """A `Bound` but for the state; two are equal where they run alike. It holds no model."""

    def __init__(self, run: Run, bound: Bound) -> None:
        self.run = run
        self.bound: Any = dataclasses.replace(bound, split=_nothing, model=None, programs={})
        fields = {f.name: getattr(self.bound, f.name) for f in dataclasses.fields(Bound)}
        self.said = {name: said for name, said in fields.items() if name != "programs"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.run == other.run and self.said == other.said

    def __hash__(self) -> int:
        return hash((self.run, self.bound.arounds))


def _split(x: Any) -> Any:
    """An input [B, ...] with its rows split as the program's mesh has them."""
    return split_rows(x) if isinstance(x, jax.Array) and x.ndim > 1 else x


def _nothing() -> Any:
    raise TypeError("a part of a Bound cannot be called")


def capabilities(model: Any) -> dict[str, Any]:
    """The fields of a `Bound` that say what `model` can do: the one place that looks."""
    config = getattr(model, "config", None)
    experts = bool(getattr(config, "num_experts", 0))
    return {
        "config": config,
        "dtype": getattr(model, "dtype", None),
        "hidden_states": hasattr(model, "hidden") and hasattr(model, "unembed"),
        "cache": hasattr(model, "empty_cache"),
        "outdates": hasattr(model, "outdated"),
        "encoder_decoder": hasattr(model, "start"),
        "chain": hasattr(model, "chain"),
        "experts": experts,
        "router_loss": getattr(config, "router_loss", 0.0) if experts else 0.0,
    }
