"""Block sparsity stored as such: only the kept blocks, and a product that reads and multiplies only
them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.reparametrised import node, precision_name
from peft_jax.core.values import is_traced
from peft_jax.core.weight import Axes, materialize, static, to_matrix
from peft_jax.pruning.masked import Masked
from peft_jax.pruning.pattern import Block
from peft_jax.pruning.stored import Stored


@node
class BlockSparse(Stored):
    """values [*lead, column blocks, k, rows, columns]: for each block of outputs its k kept blocks
    of inputs, and which ones they are, index int32 [*lead, column blocks, k]. Where outputs keep
    fewer than k, the last ones are no block of the weight's (their index lies past the end) and
    count for nothing.
    """

    values: jax.Array
    index: jax.Array
    pattern: Block = static()
    frozen: bool = static(default=True)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-4])

    def field_specs(self, spec: P) -> dict[str, P]:
        lead, out = tuple(spec)[: len(self.lead)], spec[self.out_axes[0]]
        return {"values": P(*lead, out), "index": P(*lead, out)}

    def matrix(self) -> jax.Array:
        into = math.prod(self.in_sizes) // self.pattern.rows

        def one(
            values: jax.Array, index: jax.Array
        ) -> jax.Array:  # of one block of outputs: [in, columns]
            dense = (
                jnp.zeros((into, *values.shape[1:]), values.dtype)
                .at[index]
                .add(values, mode="drop")
            )
            return dense.reshape(-1, values.shape[-1])

        def stack(a, own):
            return a.reshape(-1, *a.shape[-own:])

        flat = jax.vmap(jax.vmap(one))(stack(self.values, 4), stack(self.index, 2))
        return jnp.moveaxis(flat, 1, 2).reshape(
            *self.lead, math.prod(self.in_sizes), math.prod(self.out_sizes)
        )

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        if (in_axes, out_axes) != (self.in_axes, self.out_axes):
            return super().matmul(x, in_axes=in_axes, out_axes=out_axes, precision=precision)
        tokens = x.shape[: x.ndim - len(in_axes)]
        blocks = jnp.moveaxis(
            x.reshape(math.prod(tokens), -1, self.pattern.rows), 1, 0
        )  # [in blocks, tokens, rows]

        def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            values, index = inputs
            picked = jnp.moveaxis(blocks.at[index].get(mode="fill", fill_value=0), 0, 1).reshape(
                blocks.shape[1], -1
            )  # [tokens, k * rows]
            return jnp.matmul(picked, values.reshape(-1, values.shape[-1]).astype(x.dtype))

        with jax.default_matmul_precision(precision_name(precision)):
            y = jax.lax.map(jax.checkpoint(one), (self.values, self.index))
        return jnp.moveaxis(y, 0, 1).reshape(*tokens, *self.out_sizes)


def block_sparse(w: Masked) -> BlockSparse:
    """A masked weight whose mask consists of blocks, stored as the kept blocks.

    Raises ValueError where it does not.
    """
    if not isinstance(w.pattern, Block):
        raise ValueError(f"the mask follows the pattern {w.pattern}, not blocks")
    (rows, columns), (n_in, n_out) = (w.pattern.rows, w.pattern.columns), w.features
    shape = (*w.lead, n_in // rows, rows, n_out // columns, columns)
    kept = jnp.swapaxes(
        w.kept().reshape(shape)[..., :, 0, :, 0], -1, -2
    )  # [*lead, column blocks, row blocks]
    # The most that a column of blocks has; traced, it may have all.
    k = n_in // rows if is_traced(kept) else max(1, int(kept.sum(-1).max()))
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., :k]
    index = jnp.where(jnp.arange(k) < kept.sum(-1, keepdims=True), order, n_in // rows).astype(
        jnp.int32
    )
    dense = to_matrix(materialize(w), w.in_axes, w.out_axes).reshape(shape)
    dense = jnp.moveaxis(
        dense, -2, -4
    )  # [*lead, column blocks, row blocks, rows, columns]; other blocks are zeros already
    values = jnp.take_along_axis(dense, order[..., None, None], axis=-3)
    return BlockSparse(
        values=values,
        index=index,
        pattern=w.pattern,
        in_axes=w.in_axes,
        out_axes=w.out_axes,
        in_sizes=tuple(w.shape[a] for a in w.in_axes),
        out_sizes=tuple(w.shape[a] for a in w.out_axes),
    )
