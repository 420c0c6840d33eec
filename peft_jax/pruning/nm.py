"""N:M sparsity stored as such: the kept values and their places in each group. 2:4 of bfloat16
takes 9 bits an entry for 16.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.packing import pack_padded, unpack_padded
from peft_jax.core.reparametrised import node
from peft_jax.core.weight import Axes, materialize, matmul, static, to_matrix
from peft_jax.pruning.masked import Masked
from peft_jax.pruning.pattern import NM
from peft_jax.pruning.stored import Stored


@node
class NMSparse(Stored):
    """values [*lead, in * n / m, out]: of every m inputs the n that are kept, for each output;
    their places in the group, of the fewest of 1, 2, 3, 4 or 8 bits each, packed in uint8 [*lead,
    bytes, out]. The dense weight is made in the product.
    """

    sharded_together: ClassVar[bool] = True  # else a group could straddle devices
    values: jax.Array
    index: jax.Array
    pattern: NM = static()
    frozen: bool = static(default=True)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-2])

    def field_specs(self, spec: P) -> dict[str, P]:
        lead, into, out = (
            tuple(spec)[: len(self.lead)],
            spec[self.in_axes[0]],
            spec[self.out_axes[0]],
        )
        return {"values": P(*lead, into, out), "index": P(*lead, into, out)}

    def matrix(self) -> jax.Array:
        n, m, out = self.pattern.n, self.pattern.m, self.values.shape[-1]
        places = unpack_padded(self.index, place_bits(m), self.values.shape[-2])
        shape = (*self.lead, -1, n, 1, out)  # [groups, kept, places in the group, out]
        here = places.reshape(shape) == jnp.arange(m, dtype=jnp.uint8)[:, None]
        dense = jnp.where(here, self.values.reshape(shape), 0).sum(-3, dtype=self.dtype)
        return dense.reshape(*self.lead, math.prod(self.in_sizes), out)

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        def product(x, w):
            return matmul(
                x, w.materialize(), in_axes=in_axes, out_axes=out_axes, precision=precision
            )

        return jax.checkpoint(product)(
            x, self
        )  # made again in the backward pass: no dense copy outlives a product


def place_bits(m: int) -> int:
    """Bits that hold a place in a group of m."""
    return next(bits for bits in (1, 2, 3, 4, 8) if 2**bits >= m)


def nm_sparse(w: Masked) -> NMSparse:
    """A masked weight whose mask follows an N:M pattern, stored as values and places.

    Raises ValueError where the mask follows none.
    """
    if not isinstance(w.pattern, NM):
        raise ValueError(f"the mask follows the pattern {w.pattern}, not an N:M one")
    n, m, (n_in, n_out) = w.pattern.n, w.pattern.m, w.features
    shape = (*w.lead, n_in // m, m, n_out)
    order = jnp.argsort(~w.kept().reshape(shape), axis=-2, stable=True)[..., :n, :]
    dense = to_matrix(materialize(w), w.in_axes, w.out_axes).reshape(shape)
    values = jnp.take_along_axis(dense, order, axis=-2).reshape(*w.lead, n_in // m * n, n_out)
    places = order.astype(jnp.uint8).reshape(values.shape)
    return NMSparse(
        values=values,
        index=pack_padded(places, place_bits(m)),
        pattern=w.pattern,
        in_axes=w.in_axes,
        out_axes=w.out_axes,
        in_sizes=tuple(w.shape[a] for a in w.in_axes),
        out_sizes=tuple(w.shape[a] for a in w.out_axes),
    )
