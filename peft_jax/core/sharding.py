"""Sharding: a mesh with named axes and one rule table from path patterns to PartitionSpecs.

Axes: `data` (rows of the batch), `fsdp` (rows, and parameters sharded), `tensor` (features of a
layer), `sequence` (tokens), `expert` (rows, and the experts of a mixture). A rule speaks of a
weight's last axes; leading (layer) axes are never split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.tree import is_node, map_places, path_str
from peft_jax.core.weight import Weight

AXES = ("expert", "data", "fsdp", "sequence", "tensor")
ROWS = ("expert", "data", "fsdp")  # the axes that rows of a batch lie on
Rules = Sequence[tuple[str, P]]

# Projections into heads or units, and out of them, by the names that the families give them.
_COLUMNS = (
    "((q|k|v|qkv|gate|up|gate_up|query|key|value)_proj|(q|k|v)_lin|query|key|value|c_attn|c_fc|lin1|Wqkv|Wi|wi(_[01])?"
    "|(Self|EncDec)Attention/[qkv]|intermediate/dense)"
)
_ROWS = "((o|down)_proj|out_lin|lin2|Wo|wo|(Self|EncDec)Attention/o|c_proj|output/dense)"

# Column-parallel, row-parallel and vocabulary-parallel layers (Shoeybi et al. 2019,
# arXiv:1909.08053), with the other axis fully sharded (Rajbhandari et al. 2019, arXiv:1910.02054).
RULES: Rules = (
    (r".*experts/gate_up_proj", P("expert", "fsdp", "tensor")),
    (r".*experts/down_proj", P("expert", "tensor", "fsdp")),
    (rf".*{_COLUMNS}/kernel", P("fsdp", "tensor")),
    (rf".*{_ROWS}/kernel", P("tensor", "fsdp")),
    (r".*/(output_)?embedding", P("tensor", "fsdp")),
    (r".*lm_head/kernel", P("fsdp", "tensor")),
    (rf".*{_COLUMNS}/bias", P("tensor")),
)
LOGICAL_RULES = (("batch", ROWS), ("length", "sequence"), ("embed", None))


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


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> P:
    """The PartitionSpec of the array at `path`: the first matching rule, without axes that do not
    divide the shape.
    """
    rule = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), P())
    if len(rule) > len(shape):
        return P()
    lead = len(shape) - len(rule)
    return P(
        *[None] * lead,
        *(axis if _divides(shape[lead + i], axis, mesh) else None for i, axis in enumerate(rule)),
    )


def _divides(size: int, axis: Any, mesh: Mesh) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    return all(n is None for n in names) or size % math.prod(mesh.shape[n] for n in names if n) == 0


def shardings(params: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree like `params` (arrays or ShapeDtypeStructs, nodes or not) of NamedShardings.

    A Weight derives the specs of its own fields from its base's through `Weight.field_specs`.
    """

    def place(path: str, x: Any) -> Any:
        return node_shardings(path, x, mesh, rules)

    return map_places(place, params)


def node_shardings(path: str, x: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The NamedShardings of one place's array or node."""
    if not is_node(x):
        return NamedSharding(mesh, spec_for(path, x.shape, mesh, rules))
    if not isinstance(x, Weight):
        return jax.tree.map(lambda _: NamedSharding(mesh, P()), x)
    spec = spec_for(path, x.shape, mesh, rules)
    own = x.field_specs(P(*spec, *[None] * (len(x.shape) - len(spec))))
    if x.sharded_together:
        own = _dividing(x, own, mesh)

    def leaf(key: Any, y: Any) -> NamedSharding:
        field = path_str(key).split("/")[0]
        wanted = own.get(field, P())
        fits = len(wanted) <= len(y.shape) and all(
            _divides(n, a, mesh) for n, a in zip(y.shape, wanted, strict=False)
        )
        return NamedSharding(mesh, wanted if fits else P())

    changes = {}
    for name in own:
        value = getattr(x, name)
        if isinstance(value, Weight):
            changes[name] = node_shardings(path, value, mesh, rules)
    bare = jax.tree_util.tree_map_with_path(leaf, x)
    return bare.replace(**changes)


def _dividing(x: Weight, specs: Mapping[str, P], mesh: Mesh) -> dict[str, P]:
    """The fields' specs without the mesh axes that do not divide one of the fields."""
    sizes = {name: getattr(getattr(x, name), "shape", None) for name in specs}
    unfit = {
        axis
        for name, shape in sizes.items()
        if shape is not None
        for n, axis in zip(shape, specs[name], strict=False)
        if not _divides(n, axis, mesh)
    }
    return {
        name: P(*(None if axis in unfit else axis for axis in spec)) for name, spec in specs.items()
    }


def shard(params: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """`params` placed on the mesh. On several hosts, arrays that are not on it yet must be the same
    on each.
    """
    return jax.tree.map(_put, params, shardings(params, mesh, rules))


def shard_place(path: str, x: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """One place's array or node on the mesh, as `shard` puts it."""
    return jax.tree.map(_put, x, node_shardings(path, x, mesh, rules))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or (isinstance(x, jax.Array) and x.sharding == sharding):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda y: y, out_shardings=sharding)(x)
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: Any) -> np.ndarray:
    """The whole array on this host, gathered from the others where it is spread over several; all
    of them call it then.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def batch_sharding(mesh: Mesh, array: Any) -> NamedSharding:
    """Rows over expert, data and fsdp, tokens over sequence where they divide."""
    tokens = "sequence" if array.ndim > 1 and array.shape[1] % mesh.shape["sequence"] == 0 else None
    return NamedSharding(mesh, P(ROWS, *([] if array.ndim < 2 else [tokens])))
