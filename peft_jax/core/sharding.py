"""Sharding: a mesh with named axes, and PartitionSpecs by what a module is.

Axes: `data` (rows of the batch), `fsdp` (rows, and parameters sharded), `tensor` (features of a
layer), `sequence` (tokens), `expert` (rows, and the experts of a mixture). A spec speaks of a
weight's last axes; leading (layer) axes are never split. Of several answers the first counts: the
rules that are given, those of `Roles.rules`, the module's role, and for what has no role the
largest axis over `fsdp`. What lies whole on every device then is said.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.mesh import AXES, PARAMETERS, automatic
from peft_jax.core.roles import is_expert, known_roles, role_of
from peft_jax.core.select import OUTPUT_EMBEDDING, VECTORS, stack_at
from peft_jax.core.tree import is_node, map_places, path_str, places
from peft_jax.core.weight import Weight

logger = logging.getLogger("peft_jax")
Rules = Sequence[tuple[str, P]]  # (pattern of whole paths, spec of a weight's last axes)

# Column-parallel, row-parallel and vocabulary-parallel layers (Shoeybi et al. 2019,
# arXiv:1909.08053), with the other axis fully sharded (Rajbhandari et al. 2019, arXiv:1910.02054).
_COLUMNS, _ROWS, _WHOLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P()
_KERNELS = {
    **dict.fromkeys(("q", "k", "v", "qkv", "relative", "gate", "up", "gate_up", "head"), _COLUMNS),
    **dict.fromkeys(("o", "down"), _ROWS),
    **dict.fromkeys(("labels", "others"), _WHOLE),
}
WORTH_SAYING = 2**20  # bytes


def rule_for(path: str, rules: Rules = ()) -> P | None:
    """The spec of the last axes of the array at `path`: what `rules` or roles say; None where
    nothing does.
    """
    own = (rule for record in known_roles() for rule in record.rules)
    for pattern, spec in (*rules, *own):
        if re.fullmatch(pattern, path):
            return spec
    module, _, leaf = path.rpartition("/")
    if leaf in ("embedding", OUTPUT_EMBEDDING) and module:
        return _ROWS
    if is_expert(path):
        return P("expert", *_KERNELS[role_of(path) or ""])
    role = role_of(module)
    if leaf == "kernel":
        return _KERNELS.get(role or "")
    if leaf == "bias" and _KERNELS.get(role or "") == _COLUMNS and role != "head":
        return P("tensor")
    return _WHOLE if role == "router" else None


def spec_for(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = (), leading: int | None = None
) -> P:
    """The PartitionSpec of the array at `path`, without axes that do not divide the shape.

    `leading` axes count layers; by default one in a stack of a known name.
    """
    rule = rule_for(path, rules)
    if rule is None:
        lead = leading if leading is not None else int(stack_at(path) is not None)
        return _largest(path, shape, mesh, lead)
    if len(rule) > len(shape):
        return P()
    lead = len(shape) - len(rule)
    return P(
        *[None] * lead,
        *(axis if _divides(shape[lead + i], axis, mesh) else None for i, axis in enumerate(rule)),
    )


def _largest(path: str, shape: tuple[int, ...], mesh: Mesh, leading: int) -> P:
    """The largest axis that divides over `fsdp`; nothing of vectors."""
    whole = [None] * len(shape)
    ways = mesh.shape.get("fsdp", 1)
    fits = [i for i in range(leading, len(shape)) if shape[i] % ways == 0]
    if ways == 1 or _is_vector(path, shape, leading) or not fits:
        return P(*whole)
    axis = max(fits, key=lambda i: shape[i])
    return P(*whole[:axis], "fsdp", *whole[axis + 1 :])


def _is_vector(path: str, shape: tuple[int, ...], leading: int) -> bool:
    return len(shape) - leading < 2 or path.rpartition("/")[2] in VECTORS


def layer_counts(params: Any) -> dict[str, int]:
    """path -> how many leading axes of the array or Weight there count layers, whatever the stack
    is called.

    A stack is a module of several, all of whose arrays begin with an axis of one size, and some of
    which are stacked matrices.
    """
    shapes = {p: x.shape for p, x in places(params).items() if hasattr(x, "shape")}
    inside: dict[str, list[str]] = {}
    for path in shapes:
        parts = path.split("/")
        for i in range(1, len(parts) - 1):  # modules that have modules
            inside.setdefault("/".join(parts[:i]), []).append(path)

    def stacks(paths: list[str]) -> bool:
        several = len({p.rpartition("/")[0] for p in paths}) > 1
        sizes = {shapes[p][:1] for p in paths}
        deep = any(len(shapes[p]) > 2 for p in paths)
        return several and deep and len(sizes) == 1 and () not in sizes

    stacked = {p for paths in inside.values() if stacks(paths) for p in paths}
    return {p: int(p in stacked) for p in shapes}


def _divides(size: int, axis: Any, mesh: Mesh) -> bool:
    return size % math.prod(_sizes(axis, mesh)) == 0


def shardings(params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """A tree like `params` (arrays or ShapeDtypeStructs, nodes or not) of NamedShardings.

    A Weight derives the specs of its own fields from its base's through `Weight.field_specs`.
    """
    leading = layer_counts(params)

    def place(path: str, x: Any) -> Any:
        return node_shardings(path, x, mesh, rules, leading.get(path))

    return map_places(place, params)


def node_shardings(
    path: str, x: Any, mesh: Any, rules: Rules = (), leading: int | None = None
) -> Any:
    """The NamedShardings of one place's array or node; `leading` as in `spec_for`."""
    if not is_node(x):
        return NamedSharding(mesh, spec_for(path, x.shape, mesh, rules, leading))
    if not isinstance(x, Weight):
        return jax.tree.map(lambda _: NamedSharding(mesh, P()), x)
    spec = spec_for(path, x.shape, mesh, rules, leading)
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
            changes[name] = node_shardings(path, value, mesh, rules, leading)
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


def shard(params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """`params` placed on the mesh. On several hosts, arrays that are not on it yet must be the same
    on each.

    `rules` come before what roles say: (pattern of whole paths, spec of a weight's last axes), as
    (".*up/kernel", PartitionSpec("fsdp", "tensor")). Matrices that lie whole on every device though
    an axis of the mesh is for parameters are said once, with their bytes. Raises ValueError for a
    rule with an axis that meshes do not have.
    """
    check_rules(rules)
    found = shardings(params, mesh, rules)
    say_whole(params, found, mesh, rules)
    return jax.tree.map(_put, params, found)


def gathered(where: str, own: Mapping[str, Any], inputs: Any) -> Mapping[str, Any]:
    """A module's own parameters as its products use them in a program on a mesh: Weights whole
    along `fsdp`, each array gathered as it is stored (codes, not what they stand for).

    Where the inputs [..., in] are so few that moving them costs less, as in decoding, the compiler
    chooses. `where` is the module's path, of one layer.
    """
    if automatic("fsdp") == 1 or not jnp.issubdtype(jnp.result_type(inputs), jnp.floating):
        return own  # rows of an embedding are looked up where they lie
    mesh, tokens = jax.sharding.get_abstract_mesh(), math.prod(inputs.shape[:-1])

    def gather(name: str, x: Any) -> Any:
        if not isinstance(x, Weight) or len(x.shape) < 2 or x.routed:
            return x
        n_in, n_out = math.prod(x.shape[:-1]), x.shape[-1]
        if tokens * (n_in + n_out) < n_in * n_out:
            return x
        return jax.tree.map(_whole_rows, x, node_shardings(f"{where}/{name}", x, mesh, leading=0))

    return {name: gather(name, x) for name, x in own.items()}


def _whole_rows(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array constrained to lie as `sharding` says, but whole along `fsdp`."""

    def kept(axes: Any) -> Any:
        several = axes if isinstance(axes, tuple) else (axes,)
        names = tuple(a for a in several if a not in (None, "fsdp") and automatic(a) > 1)
        return names or None

    return jax.lax.with_sharding_constraint(x, P(*map(kept, sharding.spec)))


def check_rules(rules: Rules) -> None:
    """Raise ValueError for a rule that names an axis that meshes do not have."""
    for pattern, spec in rules:
        for axes in spec:
            for axis in axes if isinstance(axes, tuple) else (axes,):
                if axis is not None and axis not in AXES:
                    raise ValueError(
                        f"the sharding rule of {pattern!r} has an unknown axis {axis!r}; the axes "
                        f"are {', '.join(AXES)}"
                    )


def say_whole(params: Any, found: Any, mesh: Mesh, rules: Rules = ()) -> None:
    """Log which matrices of `params` lie whole on every device by `found` (of `shardings`), if no
    rule wants it so and they are large; once for a tree's places.
    """
    split = [axis for axis in PARAMETERS if mesh.shape[axis] > 1]
    sizes = _whole(params, found, mesh, rules) if split else {}
    said = (frozenset(sizes), tuple(mesh.shape.items()))
    if sum(sizes.values()) < WORTH_SAYING or said in _SAID:
        return
    _SAID.add(said)
    logger.warning(
        "%d arrays, %s, are whole on each of %d devices, %s the largest: no rule splits them over "
        "%s, or their axes do not divide; give rules=, or sharding in YAML, or register_roles",
        len(sizes),
        _bytes(sum(sizes.values())),
        mesh.size,
        max(sizes, key=lambda p: sizes[p]),
        " and ".join(split),
    )


_SAID: set[Any] = set()


def _whole(params: Any, found: Any, mesh: Mesh, rules: Rules) -> dict[str, int]:
    """path -> bytes of each matrix that nothing splits, though its rule, if it has one, would."""
    where, leading, sizes = places(found), layer_counts(params), {}
    for path, x in places(params).items():
        if is_node(x) and not isinstance(x, Weight):
            continue  # what is attached lies whole by design
        rule = rule_for(path, rules)
        meant = rule is None or any(math.prod(_sizes(axis, mesh)) > 1 for axis in rule)
        if not meant or _is_vector(path, x.shape, leading.get(path, 0)):
            continue
        if all(s.is_fully_replicated for s in jax.tree.leaves(where[path])):
            sizes[path] = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(x))
    return sizes


def _sizes(axis: Any, mesh: Mesh) -> list[int]:
    names = axis if isinstance(axis, tuple) else (axis,)
    return [mesh.shape.get(n, 1) for n in names if n is not None]


def _bytes(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def shard_place(path: str, x: Any, mesh: Mesh, rules: Rules = ()) -> Any:
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
