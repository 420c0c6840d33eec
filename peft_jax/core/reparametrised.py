"""Reparametrised weights: a base weight and the small arrays of a method that changes it.

A method is a subclass of `Reparametrised` that says what it does to a matrix (`adapt`) and, where
that is cheaper than forming the matrix, what it does to a product (`product`). `Additive` serves
the many whose change is a sum. The class does the rest: weights of any layout, several leading
axes, dropout, merging, chosen layers.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.roles import is_expert
from peft_jax.core.select import (
    OUTPUT_EMBEDDING,
    Targets,
    by_pattern,
    check_patterns,
    select_layers,
)
from peft_jax.core.tree import map_places, places, stack_of
from peft_jax.core.weight import (
    Axes,
    Layout,
    Weight,
    from_matrix,
    materialize,
    matmul,
    matrix_shape,
    ragged_matmul,
    static,
    take,
    to_matrix,
    unrounded,
)
from peft_jax.core.where import Selection

MATRIX: tuple[Axes, Axes] = ((-2,), (-1,))
TRANSPOSED: tuple[Axes, Axes] = ((-1,), (-2,))
T = TypeVar("T")
Product = Callable[[jax.Array], jax.Array]  # x [..., in] -> [..., out]


@typing.dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, static)
)
def node(cls: type[T]) -> type[T]:
    """A class of tree nodes: a frozen dataclass with keyword arguments, registered as a pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix(Weight):
    """A weight held in another form than an array, seen as a matrix [*lead, in, out] whatever its
    layout.
    """

    in_sizes: tuple[int, ...] = static()
    out_sizes: tuple[int, ...] = static()
    in_axes: Axes = static(default=(-2,))
    out_axes: Axes = static(default=(-1,))

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        ndim = len(self.lead) + len(self.in_sizes) + len(self.out_sizes)
        sizes = dict(
            zip((*self.in_axes, *self.out_axes), (*self.in_sizes, *self.out_sizes), strict=True)
        )
        lead = iter(self.lead)
        return tuple(sizes[a] if a in sizes else next(lead) for a in range(-ndim, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reparametrised(Weight):
    """`base` [*lead, in, out] (in any layout) changed by the arrays of a subclass, each of them
    [*lead, ...].

    `gate` [*lead] is 1 where a stacked layer is adapted and 0 where it is not; None stands for
    ones. `shared` holds arrays that several weights share (see `Shared`) and `key` the randomness
    of dropout; `bind` fills both.
    """

    stochastic: ClassVar[bool] = True
    base: Any
    gate: jax.Array | None = None
    key: jax.Array | None = None
    shared: Any = None
    in_axes: Axes = static(default=(-2,))
    out_axes: Axes = static(default=(-1,))
    dropout: float = static(default=0.0)
    group: str = static(default="")  # the name of the `Shared` that this weight reads, if any
    name: str = static(default="default")
    frozen: bool = static(default=False)

    def adapt(self, w: jax.Array) -> jax.Array:
        """The changed matrix [*lead, in, out] of a base matrix, both float32."""
        raise NotImplementedError

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        """x [..., in] times the changed weight, given the product with the base; without leading
        axes.
        """
        return jnp.matmul(self.drop(x), self.adapt(self.base_matrix()).astype(x.dtype))

    @property
    def changes_output(self) -> bool:
        """Whether the method changes the layer's whole output, so that it changes a bias as it does
        a row of the matrix.
        """
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return matrix_shape(self.shape, self.in_axes, self.out_axes)[0]

    @property
    def features(self) -> tuple[int, int]:
        """(in, out), flattened."""
        return matrix_shape(self.shape, self.in_axes, self.out_axes)[1:]

    def field_specs(self, spec: P) -> dict[str, P]:
        lead, into, out = (
            tuple(spec)[: len(self.lead)],
            spec[self.in_axes[0]],
            spec[self.out_axes[0]],
        )
        own = {name: P(*lead, *axes) for name, axes in self.array_specs(into, out).items()}
        return {"base": spec, "gate": P(*lead), **own}

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        """field -> mesh axes of its own axes, where `into` and `out` are the mesh axes that split
        the weight.
        """
        return {}

    def base_matrix(self) -> jax.Array:
        """The base as [*lead, in, out], float32."""
        return to_matrix(unrounded(self.base), self.in_axes, self.out_axes)

    def materialize(self) -> jax.Array:
        return self.unrounded().astype(self.dtype)

    def unrounded(self) -> jax.Array:
        base = self.base_matrix()
        w = self.gated(self.adapt(base), base)
        return from_matrix(w, self.shape, self.in_axes, self.out_axes)

    def change(self) -> jax.Array:
        """What the method adds to its base, [*lead, in, out], float32 whatever the base's dtype;
        zero where it is gated off.
        """
        base = self.base_matrix()
        return self.gated(self.adapt(base) - base, jnp.zeros_like(base))

    def gated(self, new: jax.Array, old: jax.Array) -> jax.Array:
        """`new` [*lead, ...] in the layers that are adapted, `old` in the others."""
        return new if self.gate is None else jnp.where(self.gate[..., None, None] > 0, new, old)

    def by_parts(
        self, x: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        """`product(x, w)` with this weight as an array.

        In half precision base and change are multiplied apart: together, a change below the base's
        resolution would be rounded away.
        """
        if self.whole or jnp.finfo(x.dtype).bits >= 32:
            return product(x, self.unrounded())
        change = from_matrix(self.change(), self.shape, self.in_axes, self.out_axes)
        return product(x, unrounded(self.base)) + product(x, change)

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        if (in_axes, out_axes) != (self.in_axes, self.out_axes):
            if (out_axes, in_axes) != (self.in_axes, self.out_axes):
                raise ValueError(
                    f"{type(self).__name__} made for in_axes={self.in_axes}, "
                    f"out_axes={self.out_axes} lies in a module that "
                    f"multiplies with in_axes={in_axes}, out_axes={out_axes}; pass "
                    "layout=peft_jax.core.layout_of(model, ...)"
                )
            return self.transposed(x, in_axes=in_axes, out_axes=out_axes, precision=precision)
        into, out = (tuple(self.shape[a] for a in axes) for axes in (in_axes, out_axes))
        tokens = x.shape[: x.ndim - len(in_axes)]

        def base(x: jax.Array) -> jax.Array:
            x = x.reshape(*x.shape[:-1], *into)
            y = matmul(x, self.base, in_axes=in_axes, out_axes=out_axes, precision=precision)
            return y.reshape(*y.shape[: y.ndim - len(out)], math.prod(out))

        x = x.reshape(*token_axes(tokens), math.prod(into))
        with jax.default_matmul_precision(precision_name(precision)):
            y = self.product(x, base)
        if self.gate is not None:
            y = jnp.where(self.gate > 0, y, base(x))
        return y.reshape(*tokens, *out)

    def transposed(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        """The product with the transpose: the head of a model that ties it to its embedding."""
        return self.by_parts(
            x, lambda x, w: matmul(x, w, in_axes=in_axes, out_axes=out_axes, precision=precision)
        )

    def ragged_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return self.by_parts(x, lambda x, w: ragged_matmul(x, w, sizes))

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        return take(self.unrounded(), ids, self.dtype if dtype is None else dtype)

    def drop(self, x: jax.Array) -> jax.Array:
        """`x` with dropout, where it is on."""
        return dropped(x, self.dropout, self.key)

    def recover(self, w: jax.Array) -> jax.Array:
        """The base matrix behind the changed matrix `w` [*lead, in, out], float32: the inverse of
        `adapt`.
        """
        raise TypeError(f"{type(self).__name__} cannot be unmerged")

    def bias(self, bias: jax.Array) -> jax.Array:
        inner = self.base.bias(bias) if isinstance(self.base, Weight) else bias
        return self._as_row(self.adapt, inner) if self.changes_output else inner

    def recover_bias(self, bias: jax.Array) -> jax.Array:
        inner = self._as_row(self.recover, bias) if self.changes_output else bias
        return self.base.recover_bias(inner) if isinstance(self.base, Weight) else inner

    def _as_row(self, change: Callable[[jax.Array], jax.Array], bias: jax.Array) -> jax.Array:
        row = bias.astype(jnp.float32).reshape(*self.lead, 1, -1)
        return self.gated(change(row), row).reshape(bias.shape)

    def unmerge(self, merged: Any) -> Self:
        w = to_matrix(materialize(merged), self.in_axes, self.out_axes).astype(jnp.float32)
        base = self.gated(self.recover(w), w)
        return self.replace(
            base=from_matrix(base, self.shape, self.in_axes, self.out_axes).astype(self.dtype)
        )


class Additive(Reparametrised):
    """A change that is a sum: the base plus `delta`."""

    def delta(self) -> jax.Array:
        """What is added, [*lead, in, out], float32."""
        raise NotImplementedError

    def update(self, x: jax.Array) -> jax.Array:
        """x [..., in] times `delta`, without leading axes; overridden where that is cheaper than
        forming it.
        """
        return jnp.matmul(x, self.delta().astype(x.dtype))

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return base(x) + self.update(self.drop(x))

    def adapt(self, w: jax.Array) -> jax.Array:
        return w + self.delta()

    def recover(self, w: jax.Array) -> jax.Array:
        return w - self.delta()

    @property
    def sum(self) -> bool:
        """Whether the change is `delta` alone, whatever the base; a subclass may make more of it
        (DoRA).
        """
        return type(self).adapt is Additive.adapt

    def change(self) -> jax.Array:
        if not self.sum:
            return super().change()
        delta = self.delta().astype(jnp.float32)
        return self.gated(delta, jnp.zeros_like(delta))


def scaled(y: jax.Array, factor: jax.Array) -> jax.Array:
    """`y` times a factor, rounded to y's dtype once: a float32 factor near one is not rounded to
    one in half precision.
    """
    return (y * factor).astype(y.dtype)


@node
class Replacement(Reparametrised):
    """`value`, an array of the adapter's own [*lead, ...], in the place of `base`: whole modules,
    biases, norms.

    An array without inputs, as a bias, has `in_axes=()`. `saved_as` says what it is: "module"
    (PEFT's `modules_to_save`), "bias", "norm" (layer-norm tuning), or "base" (stored beside an
    adapter, as a resized embedding is).
    """

    trainable: ClassVar[tuple[str, ...]] = ("value",)
    stochastic: ClassVar[bool] = False
    value: jax.Array
    saved_as: str = static(default="module")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def field_specs(self, spec: P) -> dict[str, P]:
        return {"base": spec, "value": spec, "gate": P(*tuple(spec)[: len(self.lead)])}

    def adapt(self, w: jax.Array) -> jax.Array:
        return to_matrix(self.value, self.in_axes, self.out_axes).astype(jnp.float32)

    def materialize(self) -> jax.Array:
        if self.gate is None:
            return self.value
        on = self.gate.reshape(*self.gate.shape, *[1] * (self.value.ndim - self.gate.ndim)) > 0
        return jnp.where(on, self.value, materialize(self.base)).astype(self.dtype)

    def unrounded(self) -> jax.Array:
        return self.materialize().astype(jnp.float32)

    def resolved(self) -> Any:
        return self.materialize()

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        return matmul(
            x, self.materialize(), in_axes=in_axes, out_axes=out_axes, precision=precision
        )

    def bias(self, bias: jax.Array) -> jax.Array:
        return bias

    def recover_bias(self, bias: jax.Array) -> jax.Array:
        return bias

    def unmerge(self, merged: Any) -> Self:
        return self  # what it lies over is still there


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with dropout of this rate, where there is a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0)


def precision_name(precision: Any) -> str | None:
    """A `precision` argument of Flax's layers as a name, the higher one of a pair."""
    if isinstance(precision, tuple):
        precision = max((jax.lax.Precision(p) for p in precision), key=lambda p: p.value)
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision


def token_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and tokens as one axis: on a CPU, products of rank r take half the time on two axes that
    they take on three.

    Axes that a mesh splits over `sequence` stay as they are, since joining two split axes would
    gather them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return shape if not mesh.empty and mesh.shape.get("sequence", 1) > 1 else (math.prod(shape),)


# --------------------------------------------------------------------------------------------------
# placing nodes


class Site(NamedTuple):
    """Where a node is to stand: its path, the weight there, and the weight's layout."""

    path: str
    base: Any
    in_axes: Axes
    out_axes: Axes
    layers: tuple[str, ...]  # the path of each stacked layer, or the path alone
    chosen: tuple[bool, ...]  # which of them are adapted

    @property
    def sizes(self) -> tuple[tuple[int, ...], int, int]:
        """(leading axes, in, out)."""
        return matrix_shape(self.base.shape, self.in_axes, self.out_axes)

    @property
    def looks_up(self) -> bool:
        """Whether it is an embedding [V, D], whose inputs are ids of tokens."""
        return (
            self.path.rpartition("/")[2] == "embedding" and (self.in_axes, self.out_axes) == MATRIX
        )

    def matrix(self) -> jax.Array:
        """The weight as [*lead, in, out], float32."""
        return to_matrix(unrounded(self.base), self.in_axes, self.out_axes)

    def check_divides(
        self, n: int, option: str, *, inputs: bool = True, outputs: bool = True
    ) -> None:
        """Raise ValueError where `n`, the value of `option`, does not divide the weight's inputs or
        outputs.
        """
        _, n_in, n_out = self.sizes
        if (inputs and n_in % n) or (outputs and n_out % n):
            raise ValueError(
                f"{option}={n} does not divide the {n_in} inputs or {n_out} outputs of {self.path}"
            )

    def check_whole(self, what: str) -> None:
        """Raise ValueError, saying `what` all layers of a stack do, where targets name some of them
        only.
        """
        if not all(self.chosen):
            raise ValueError(
                f"the layers stacked at {self.path} {what}; unstack_layers to choose among them"
            )

    def common(self, **fields: Any) -> dict[str, Any]:
        """The fields that every node has."""
        lead = self.sizes[0]
        gate = None if all(self.chosen) else per_layer(self.chosen, lead)
        return {
            "base": self.base,
            "in_axes": self.in_axes,
            "out_axes": self.out_axes,
            "gate": gate,
            **fields,
        }

    def pattern(self, default: Any, pattern: Mapping[str, Any]) -> list[Any]:
        """For each layer the value of the first key of `pattern` that matches it, or the
        default.
        """
        return [
            by_pattern(name, by_pattern(self.path, default, pattern), pattern)
            for name in self.layers
        ]

    def by_layer(self, values: Sequence[Any]) -> jax.Array:
        """A number per layer as an array [*lead]."""
        return per_layer(values, self.sizes[0])


def per_layer(values: Sequence[Any], lead: tuple[int, ...]) -> jax.Array:
    """A number per layer as an array [*lead], float32."""
    array = jnp.asarray(values, jnp.float32)
    return jnp.broadcast_to(
        array.reshape(-1, *[1] * (len(lead) - 1)) if lead else array.reshape(()), lead
    )


def place_nodes(
    params: Any,
    key: jax.Array,
    make: Callable[[Site, jax.Array], Weight],
    at: Selection,
    *,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """`params` with `make(site, key)` at each place that is selected, and biases and whole modules
    of the adapter marked beside.

    `layers` restricts to these layer numbers (PEFT's `layers_to_transform`), in stacked trees by a
    gate. Raises ValueError for a target, or a key of one of `patterns`, that matches nothing, or a
    layer that is not there.
    """
    sites = find_sites(params, **at.places)
    check_patterns([n for s in sites.values() for n in (s.path, *s.layers)], **(patterns or {}))
    keys = dict(zip(sites, jax.random.split(key, len(sites)), strict=True))
    made = {path: make(site, keys[path]) for path, site in sites.items()}
    for path, new in made.items():
        check_new(path, new)
    placed = map_places(lambda path, w: made.get(path, w), params)
    return train_extras(placed, list(sites), at)


def check_new(path: str, new: Any) -> None:
    """Raise ValueError where the node `new` for a place lies over one of its kind and name."""
    name = getattr(new, "name", "")
    if name and any(
        type(n) is type(new) and getattr(n, "name", "") == name
        for n in stack_of(getattr(new, "base", None))
    ):
        raise ValueError(
            f"{path} has {type(new).__name__} {name!r} already; give this one another name with "
            "adapter="
        )


def train_extras(params: Any, paths: list[str], at: Selection) -> Any:
    """Biases ("all", or "lora_only": those beside `paths`) and whole modules as the adapter's own,
    as PEFT does.
    """
    bias, modules_to_save, layout = at.bias, at.modules_to_save, at.layout
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', not {bias!r}")
    beside = {path.rpartition("/")[0] + "/bias" for path in paths}
    saved = (
        select_layers(params, modules_to_save, layout=layout, min_ndim=0) if modules_to_save else {}
    )
    if clash := set(saved) & set(paths):
        raise ValueError(f"{sorted(clash)[0]} is both a target and in modules_to_save")
    biases = [p for p in places(params) if p.endswith("/bias")]
    wanted = {p: (True,) for p in biases if bias == "all" or (bias == "lora_only" and p in beside)}
    kinds = {p: "bias" for p in wanted} | {p: "module" for p in saved}
    chosen = wanted | {p: flags for p, (_, flags) in saved.items()}
    return replace_arrays(params, kinds, name=at.adapter, chosen=chosen, layout=layout)


def replace_arrays(
    params: Any,
    kinds: Mapping[str, str],
    *,
    name: str,
    chosen: Mapping[str, Sequence[bool]] | None = None,
    layout: Layout | None = None,
) -> Any:
    """`params` with a `Replacement` of the adapter `name` at each path of `kinds` (its `saved_as`).

    It starts as what is there. `chosen` says for a stack which of its layers are replaced.
    """
    known = places(params)

    def put(path: str, w: Any) -> Any:
        if path not in kinds:
            return w
        return replace_array(
            path,
            w,
            kinds[path],
            name,
            known,
            chosen=(chosen or {}).get(path, (True,)),
            layout=layout,
        )

    return map_places(put, params)


def replace_array(
    path: str,
    w: Any,
    kind: str,
    name: str,
    known: Mapping[str, Any],
    *,
    value: Any = None,
    chosen: Sequence[bool] = (True,),
    layout: Layout | None = None,
) -> Replacement:
    """The array or Weight w at a place of `known` under a `Replacement` that is `value`, by default
    what w is.
    """
    axes = axes_within(path, known, layout)
    gate = None if all(chosen) else per_layer(chosen, matrix_shape(w.shape, *axes)[0])
    value = materialize(w) if value is None else value
    fields: dict[str, Any] = {
        "base": w,
        "value": value,
        "gate": gate,
        "saved_as": kind,
        "name": name,
    }
    new = Replacement(**fields, in_axes=axes[0], out_axes=axes[1], frozen=kind == "base")
    check_new(path, new)
    return new


def replacement(w: Any, name: str) -> Replacement | None:
    """The array that the adapter `name` has in the place of the array or Weight w, if any."""
    return next((n for n in stack_of(w) if isinstance(n, Replacement) and n.name == name), None)


def replacements(params: Any, name: str) -> dict[str, Replacement]:
    """path -> what the adapter `name` has there in the place of the base's array."""
    found = {p: replacement(w, name) for p, w in places(params).items()}
    return {p: n for p, n in found.items() if n is not None}


def axes_within(
    path: str, known: Mapping[str, Any], layout: Layout | None = None
) -> tuple[Axes, Axes]:
    """(in_axes, out_axes) of whatever stands at `path`: a bias has the outputs of its kernel,
    another vector one axis.
    """
    module, _, leaf = path.rpartition("/")
    matrix = leaf in ("kernel", "embedding", OUTPUT_EMBEDDING) or is_expert(path)
    if path in (layout or {}) or matrix:
        return (layout or {}).get(path, axes_of(path))
    kernel = f"{module}/kernel"
    outs = (
        len((layout or {}).get(kernel, axes_of(kernel))[1])
        if leaf == "bias" and kernel in known
        else 1
    )
    return (), tuple(range(-min(outs, known[path].ndim), 0))


def check_dropout(dropout: float) -> None:
    """Raise ValueError for a dropout outside [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def find_sites(
    params: Any,
    *,
    targets: Targets,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    layout: Layout | None = None,
) -> dict[str, Site]:
    """path -> Site for each place that `targets` name; see `place_nodes`."""
    chosen = select_layers(params, targets, exclude, layers, layout)
    known = places(params)
    return {
        path: Site(path, known[path], *(layout or {}).get(path, axes_of(path)), names, flags)
        for path, (names, flags) in chosen.items()
    }


def axes_of(path: str) -> tuple[Axes, Axes]:
    """(in_axes, out_axes) of the weight at `path` in a model of this package: a head's embedding
    maps D to V.
    """
    return TRANSPOSED if path.rpartition("/")[2] == OUTPUT_EMBEDDING else MATRIX
