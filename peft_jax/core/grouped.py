"""Products of rows in groups, each group with a matrix of its own, and their gradients.

The forward product and the gradient of the rows are `jax.lax.ragged_dot`, which a TPU multiplies
group by group. The gradient of the matrices is dense there (every row with every group, E times the
work), so on a TPU it is the kernel `tgmm` of JAX's megablox. Letters: N rows, E groups.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

_ROWS, _COLUMNS = 512, 1024  # of the kernel's tiles


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [N, in], the first `sizes[0]` rows times w[0], the next `sizes[1]` times w[1], ... of
    w [E, in, out]: [N, out]. What becomes of rows beyond the groups is not said.
    """
    return _product(jax.sharding.get_abstract_mesh(), x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(mesh: Any, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes)


def _forward(mesh: Any, x: Any, w: Any, sizes: Any) -> Any:
    y = jax.lax.ragged_dot(x.value, w.value, sizes.value)
    rows = x.value if w.perturbed else None  # frozen matrices need no rows for their gradient
    matrices = w.value if x.perturbed else None
    return y, (rows, matrices, sizes.value)


def _backward(mesh: Any, saved: Any, grad: Any) -> Any:
    x, w, sizes = saved
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    d_x = None if w is None else jax.lax.ragged_dot(grad, w.mT, sizes)
    return d_x, None if x is None else _outer(mesh, x, grad, sizes), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _outer(mesh: Any, x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    """x^T grad of each group: [E, in, out] of x [N, in] and grad [N, out]."""
    return jax.lax.platform_dependent(
        x, grad, sizes, tpu=functools.partial(_on_mesh, mesh), default=_dense_outer
    )


def _dense_outer(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct((len(sizes), x.shape[-1], grad.shape[-1]), x.dtype)
    product = functools.partial(jax.lax.ragged_dot, x, group_sizes=sizes)
    return jax.linear_transpose(product, like)(grad)[0]


def _on_mesh(mesh: Any, x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    """The kernel where a mesh has axes that the compiler places, which cannot split a kernel: the
    wider of both sides lies over `tensor`.
    """
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {axis for axis, kind in kinds if kind is AxisType.Auto}
    if not free:
        return tiled_outer(x, grad, sizes)
    wide = max(x.shape[-1], grad.shape[-1])
    axis = "tensor" if "tensor" in free and wide % mesh.shape["tensor"] == 0 else None
    into, out = (axis, None) if x.shape[-1] == wide else (None, axis)
    return jax.shard_map(
        tiled_outer,
        mesh=mesh,
        in_specs=(P(None, into), P(None, out), P()),
        out_specs=P(None, into, out),
        axis_names=free,
        check_vma=False,
    )(x, grad, sizes)


def tiled_outer(
    x: jax.Array, grad: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """x^T grad of each group by megablox's kernel, which wants a multiple of its tiles' rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    more = -len(x) % _ROWS
    x, grad = (jnp.pad(a, [(0, more), (0, 0)]) for a in (x, grad))
    tiling = (_ROWS, min(_COLUMNS, x.shape[-1]), min(_COLUMNS, grad.shape[-1]))
    return tgmm(x.T, grad, sizes, x.dtype, tiling, interpret=interpret)
