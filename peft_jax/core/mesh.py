"""The mesh: its named axes, the mesh that a program is for, and how activations lie on it.

A program's mesh is that of its parameters: `Bound` enters it, so that models and attachments find
it by `jax.sharding.get_abstract_mesh()`, whether or not the caller stands in a mesh's context.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("expert", "data", "fsdp", "sequence", "tensor")
ROWS = ("expert", "data", "fsdp")  # the axes that rows of a batch lie on
PARAMETERS = ("expert", "fsdp", "tensor")  # the axes that parameters lie on


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices. `axes` maps axis names to sizes, one of which may be -1 ("the
    rest"); missing ones are 1.

    Raises ValueError for an unknown axis or sizes that do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    axes = dict(axes or {"data": -1})
    if unknown := set(axes) - set(AXES):
        raise ValueError(
            f"unknown mesh axis {sorted(unknown)[0]!r}; the axes are {', '.join(AXES)}"
        )
    sizes = [axes.get(name, 1) for name in AXES]
    if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh sizes must be positive, at most one of them -1: {axes}")
    known = math.prod(n for n in sizes if n > 0)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {axes} does not divide the {len(devices)} devices there are")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_sharding(mesh: Mesh, array: Any) -> NamedSharding:
    """Rows over expert, data and fsdp, tokens over sequence where they divide."""
    tokens = "sequence" if array.ndim > 1 and array.shape[1] % mesh.shape["sequence"] == 0 else None
    return NamedSharding(mesh, P(ROWS, *([] if array.ndim < 2 else [tokens])))


def mesh_of(tree: Any) -> AbstractMesh | None:
    """The mesh that the arrays of `tree`, traced or not, lie on; None where they lie on none."""
    placed = _first_placed(tree)
    return None if placed is None else jax.typeof(placed).sharding.mesh.abstract_mesh


def _first_placed(tree: Any) -> jax.Array | None:
    """The first array of `tree` that lies on a mesh."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return next((x for x in arrays if not jax.typeof(x).sharding.mesh.empty), None)


@contextlib.contextmanager
def entered_mesh(tree: Any) -> Iterator[None]:
    """Inside of a program that is being traced: the mesh that arrays of `tree` lie on, unless one
    is entered.
    """
    placed = _first_placed(tree) if jax.sharding.get_abstract_mesh().empty else None
    if not isinstance(placed, Tracer) or placed.to_concrete_value() is not None:
        yield
        return
    with jax.sharding.use_abstract_mesh(jax.typeof(placed).sharding.mesh.abstract_mesh):
        yield


def row_axes(size: int) -> tuple[str, ...]:
    """The axes of the program's mesh that `size` rows are split over: as many of `ROWS` as divide
    them, of those that the compiler places.
    """
    axes: tuple[str, ...] = ()
    for axis in ROWS:
        ways = automatic(axis)
        if ways > 1 and size % ways == 0:
            axes, size = (*axes, axis), size // ways
    return axes


def automatic(axis: str) -> int:
    """The size of an axis of the program's mesh; 1 where it has none, or a caller's own code says
    what lies where.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if kinds.get(axis) is AxisType.Auto else 1


def split_rows(x: jax.Array) -> jax.Array:
    """An activation [B, ...] with its rows where `batch_sharding` puts them; the compiler places
    the other axes.
    """
    if not x.ndim or not (rows := row_axes(x.shape[0])):
        return x
    rest = [P.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(rows, *rest))


def batch_axes(rows: int, tokens: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the program's mesh that rows, and tokens of a row, are split over."""
    ways = automatic("sequence")
    return row_axes(rows), ("sequence",) if ways > 1 and tokens % ways == 0 else ()


def split_outputs(out: Any, rows: int | None) -> Any:
    """What a module returns, each array [rows, ...] of it by `split_rows`."""
    if rows is None or not row_axes(rows):
        return out

    def split(x: Any) -> Any:
        own = isinstance(x, jax.Array) and x.ndim > 1 and x.shape[0] == rows
        return split_rows(x) if own else x

    return jax.tree.map(split, out)


def rows_in(args: Sequence[Any]) -> int | None:
    """How many rows a model is called with: the first axis of its first input [B, ...]."""
    first = next((x for x in args if isinstance(x, jax.Array) and x.ndim > 1), None)
    return None if first is None else first.shape[0]


def split_tokens(x: jax.Array) -> jax.Array:
    """An activation [B, T, ...] with its rows and tokens where `batch_sharding` puts them, whole
    along the other axes.
    """
    rows, tokens = batch_axes(*x.shape[:2])
    if not rows and not tokens:
        return x
    return jax.lax.with_sharding_constraint(x, P(rows or None, tokens or None))
