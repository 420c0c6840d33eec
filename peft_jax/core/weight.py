"""Weights: what may stand in a parameter tree where an array stood.

A `Weight` is a frozen dataclass registered as a pytree. It has the logical `shape` and `dtype` of
the array it replaces and knows how to be multiplied with. Every array in it keeps the tree's
leading axes (the layer axis of stacked layers), so scanning, sharding, checkpointing and optimizer
states need no special case.

Axes of a weight are named by negative numbers, which leading axes do not change: a `Dense` kernel
[in, out] has `in_axes=(-2,)` and `out_axes=(-1,)`, stacked or not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.grouped import grouped_matmul

Axes = tuple[int, ...]
Layout = Mapping[str, tuple[Axes, Axes]]  # path -> (in_axes, out_axes)


def static(**options: Any) -> Any:
    """A dataclass field that is part of a node's structure, not an array."""
    return dataclasses.field(metadata={"static": True}, **options)


class Node:
    """Something other than an array in a parameter tree. `trainable` names the fields that
    train.
    """

    trainable: ClassVar[tuple[str, ...]] = ()
    stochastic: ClassVar[bool] = (
        False  # has a `key` field that `bind` fills when it is given an rng
    )
    routed: ClassVar[bool] = False  # has an `ids` field that `bind` fills with each row's adapter
    zero_padded: ClassVar[bool] = (
        False  # zeros after the end of its arrays change nothing, so that sizes can be evened out
    )
    biases: ClassVar[
        tuple[str, ...]
    ] = ()  # patterns (re) of the fields that are biases or norms and are not called so
    frozen: bool = False

    def plain(self) -> Self:
        """This node without what a start or a schedule keeps beside its arrays: as a bank holds
        it.
        """
        return self

    def drawn(self, rng: jax.Array) -> Self:
        """This node with what it draws in training; `rng` is the same for all nodes of a tree."""
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class Weight(Node):
    """An array's stand-in. Subclasses define `shape`, `dtype` and `materialize`, and override what
    they do better.

    `sharded_together`: a mesh axis that does not divide one of the fields splits none of them.
    """

    sharded_together: ClassVar[bool] = False
    pruned: ClassVar[bool] = False  # holds zeros that are to stay
    all_rows: ClassVar[bool] = False  # asks for all rows of a batch at once, wherever they lie

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, leading axes included."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """Logical dtype."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def materialize(self) -> jax.Array:
        """The array that this weight stands for."""
        raise NotImplementedError

    def unrounded(self) -> jax.Array:
        """That array in float32, not rounded to `dtype` on the way where a subclass can tell it
        better.

        What weights differ by is taken of these: of two arrays of half precision it would be mostly
        their rounding.
        """
        return self.materialize().astype(jnp.float32)

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        """`x` [..., *in] times this weight -> [..., *out]; see the function `matmul`."""
        return matmul(
            x, self.materialize(), in_axes=in_axes, out_axes=out_axes, precision=precision
        )

    def ragged_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`x` [N, in] in groups of `sizes` [E] rows times this weight [E, in, out]; see the
        function `ragged_matmul`.
        """
        return ragged_matmul(x, self.materialize(), sizes)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        """Rows `ids` [...] of an embedding [V, D] -> [..., D]."""
        return take(self.materialize(), ids, dtype)

    def merge(self) -> Any:
        """This weight with its update folded in: an array, or a simpler Weight."""
        return self.materialize()

    def resolved(self) -> Any:
        """The array that this node has as it is used, where it has one; else itself."""
        return self

    def field_specs(self, spec: P) -> dict[str, P]:
        """PartitionSpecs of this weight's fields, given `spec` (one entry an axis) for the array it
        replaces.

        A field that is itself a Weight derives its own; fields left out are replicated.
        """
        return {}

    @property
    def whole(self) -> bool:
        """Whether the weight itself trains, so that what is trained is a model and no adapter."""
        return False

    def train(self) -> Self:
        """This weight with its own numbers training, as full fine-tuning has it; itself where they
        cannot.
        """
        return self

    def bias(self, bias: jax.Array) -> jax.Array:
        """What becomes of the bias [*lead, *out] beside this weight, for methods that change a
        layer's whole output.
        """
        return bias

    def recover_bias(self, bias: jax.Array) -> jax.Array:
        """The inverse of `bias`."""
        return bias

    def unmerge(self, merged: Any) -> Self:
        """This node over the base that `merged` (made by `merge`) came from, up to rounding."""
        raise TypeError(f"{type(self).__name__} cannot be unmerged")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trainable(Weight):
    """A plain array that trains, as in full fine-tuning: of the model, not of an adapter (see
    `Replacement`).
    """

    trainable: ClassVar[tuple[str, ...]] = ("value",)
    value: jax.Array
    frozen: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def materialize(self) -> jax.Array:
        return self.value

    @property
    def whole(self) -> bool:
        return True

    def resolved(self) -> Any:
        return self.value

    def field_specs(self, spec: P) -> dict[str, P]:
        return {"value": spec}

    def unmerge(self, merged: Any) -> Self:
        return self.replace(value=merged)


def materialize(w: Any) -> jax.Array:
    """The array behind `w`, an array or a Weight."""
    return w.materialize() if isinstance(w, Weight) else w


def unrounded(w: Any) -> jax.Array:
    """The array behind `w`, an array or a Weight, in float32; see `Weight.unrounded`."""
    return w.unrounded() if isinstance(w, Weight) else w.astype(jnp.float32)


def matmul(
    x: jax.Array, w: Any, *, in_axes: Axes = (-2,), out_axes: Axes = (-1,), precision: Any = None
) -> jax.Array:
    """Contract the last `len(in_axes)` axes of `x` with `in_axes` of `w`; the result is [...,
    *out_axes].

    `w` is an array or a Weight without leading axes. The product is computed in x's dtype.
    Raises ValueError where the axes of `w` are not exactly `in_axes` and `out_axes`.
    """
    if len(in_axes) + len(out_axes) != w.ndim:
        raise ValueError(
            f"a weight of shape {w.shape} was multiplied as if it had {len(in_axes)} input and "
            f"{len(out_axes)} output axes"
        )
    if isinstance(w, Weight):
        return w.matmul(x, in_axes=in_axes, out_axes=out_axes, precision=precision)
    x_axes = tuple(range(x.ndim - len(in_axes), x.ndim))
    w_axes = tuple(a % w.ndim for a in in_axes)
    y = jax.lax.dot_general(x, w.astype(x.dtype), ((x_axes, w_axes), ((), ())), precision=precision)
    order = sorted(range(len(out_axes)), key=lambda i: out_axes[i] % w.ndim)
    if order == list(range(len(out_axes))):
        return y
    lead = x.ndim - len(in_axes)
    return jnp.moveaxis(y, range(lead, y.ndim), [lead + i for i in order])


def ragged_matmul(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    """The first `sizes[0]` rows of `x` [N, in] times `w[0]`, the next `sizes[1]` times `w[1]`, ...:
    [N, out] in x's dtype.

    `w` [E, in, out] is an array or a Weight. What becomes of rows beyond the groups is not said.
    """
    if isinstance(w, Weight):
        return w.ragged_matmul(x, sizes)
    return grouped_matmul(x, w.astype(x.dtype), sizes.astype(jnp.int32))


def row_groups(n: int, sizes: jax.Array) -> jax.Array:
    """The group [n] of each of `n` rows of a ragged product, from 0 on; `len(sizes)` of rows beyond
    the groups.
    """
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(n), side="right")


def take(w: Any, ids: jax.Array, dtype: Any = None) -> jax.Array:
    """Rows `ids` [...] of the embedding `w` [V, D] in `dtype` -> [..., D]."""
    if isinstance(w, Weight):
        return w.take(ids, dtype)
    rows = jnp.take(w, ids, axis=0)
    return rows if dtype is None else rows.astype(dtype)


def einsum(equation: str, x: jax.Array, w: Any, *, precision: Any = None) -> jax.Array:
    """`jnp.einsum(equation, x, w)` where `w` may be a Weight.

    Labels shared by all three operands must lead in `w` (stacked experts) and are mapped over; an
    equation that is no product of this kind is computed on the materialised weight.
    """
    if not isinstance(w, Weight):
        return jnp.einsum(equation, x, w.astype(x.dtype), precision=precision)
    xs, ws, out = _parse(equation, x.ndim, w.ndim)
    batch = [label for label in ws if label in xs and label in out]
    contracted = [label for label in ws if label in xs and label not in out]
    free = [label for label in ws if label not in xs and label in out]
    rest = [label for label in xs if label not in ws]
    simple = (
        len(batch) + len(contracted) + len(free) == len(ws) and contracted and set(rest) <= set(out)
    )
    if (
        not simple
        or list(ws[: len(batch)]) != batch
        or len(set(xs)) < len(xs)
        or len(set(ws)) < len(ws)
    ):
        return jnp.einsum(equation, x, w.materialize().astype(x.dtype), precision=precision)
    axes = {label: position - len(ws) for position, label in enumerate(ws)}
    product: Callable[..., jax.Array] = functools.partial(
        matmul,
        in_axes=tuple(axes[label] for label in contracted),
        out_axes=tuple(axes[label] for label in free),
        precision=precision,
    )
    for _ in batch:
        product = jax.vmap(product)
    x = jnp.transpose(x, [xs.index(label) for label in [*batch, *rest, *contracted]])
    y, labels = product(x, w), [*batch, *rest, *free]
    return jnp.transpose(y, [labels.index(label) for label in out])


def _parse(equation: str, x_ndim: int, w_ndim: int) -> tuple[str, str, str]:
    """The three subscripts of an einsum of two operands, ellipses spelled out."""
    inputs, out = equation.replace(" ", "").split("->")
    xs, ws = inputs.split(",")
    spare = [c for c in "ZYXWVUTSRQPO" if c not in equation]
    letters = "".join(spare[: x_ndim - len(xs.replace("...", ""))])
    if len(ws.replace("...", "")) != w_ndim:
        raise ValueError(f"einsum {equation!r} does not fit a weight of {w_ndim} axes")
    return xs.replace("...", letters), ws.replace("...", ""), out.replace("...", letters)


def matrix_shape(
    shape: tuple[int, ...], in_axes: Axes, out_axes: Axes
) -> tuple[tuple[int, ...], int, int]:
    """(leading axes, input size, output size) of a weight of this shape seen as a stack of
    matrices.
    """
    taken = {a % len(shape) for a in (*in_axes, *out_axes)}
    lead = tuple(n for i, n in enumerate(shape) if i not in taken)
    return lead, math.prod(shape[a] for a in in_axes), math.prod(shape[a] for a in out_axes)


def to_matrix(w: jax.Array, in_axes: Axes, out_axes: Axes) -> jax.Array:
    """`w` as [*lead, in, out]."""
    lead, n_in, n_out = matrix_shape(w.shape, in_axes, out_axes)
    axes = [a % w.ndim for a in (*in_axes, *out_axes)]
    w = jnp.moveaxis(w, axes, range(len(lead), w.ndim))
    return w.reshape(*lead, n_in, n_out)


def from_matrix(m: jax.Array, shape: tuple[int, ...], in_axes: Axes, out_axes: Axes) -> jax.Array:
    """The inverse of `to_matrix` for a weight of `shape`."""
    lead, _, _ = matrix_shape(shape, in_axes, out_axes)
    axes = [a % len(shape) for a in (*in_axes, *out_axes)]
    m = m.reshape(*lead, *(shape[a] for a in axes))
    return jnp.moveaxis(m, range(len(lead), m.ndim), axes)
