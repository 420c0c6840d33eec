"""MiSS (Kang and Yin 2024, arXiv:2409.15371): one trained block repeated down the input axis.

The input is summed over its in/r pieces of length r and multiplied with a block [r, out]. `mini`
trains only `mini_rank` of the block's columns and repeats them; `bat` has a block for each r
outputs and lets it act through the weight: W + W_block B + B.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import (
    Additive,
    Product,
    Reparametrised,
    Site,
    check_dropout,
    node,
    place_nodes,
)
from peft_jax.core.where import Selection, Where


@node
class MiSS(Additive):
    """block [*lead, r, out], or [*lead, r, mini_rank]."""

    trainable: ClassVar[tuple[str, ...]] = ("block",)
    block: jax.Array

    def _block(self) -> jax.Array:
        return jnp.tile(self.block, self.features[1] // self.block.shape[-1])

    def delta(self) -> jax.Array:
        n_in, r = self.features[0], self.block.shape[-2]
        return jnp.tile(self._block(), (-(-n_in // r), 1))[..., :n_in, :]

    def update(self, x: jax.Array) -> jax.Array:
        r = self.block.shape[-2]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % r)])
        pieces = x.reshape(*x.shape[:-1], -1, r).sum(-2)
        return jnp.matmul(pieces, self._block().astype(x.dtype))


@node
class BatMiSS(Reparametrised):
    """block [*lead, out/r, r, r]; each r x r block W_ij of the weight, as [out, in], becomes W_ij +
    W_ij B_j + B_j.
    """

    trainable: ClassVar[tuple[str, ...]] = ("block",)
    block: jax.Array

    def _split(self, w: jax.Array) -> jax.Array:
        """[*lead, in, out] -> [*lead, in/r, out/r, r (out), r (in)]."""
        r = self.block.shape[-1]
        w = w.reshape(*w.shape[:-2], w.shape[-2] // r, r, w.shape[-1] // r, r)
        return jnp.moveaxis(w, -3, -1)

    def _join(self, blocks: jax.Array) -> jax.Array:
        return jnp.moveaxis(blocks, -1, -3).reshape(*self.lead, *self.features)

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        w = self.base_matrix()
        return base(x) + jnp.matmul(x, (self.adapt(w) - w).astype(x.dtype))

    def adapt(self, w: jax.Array) -> jax.Array:
        b = self.block[..., None, :, :, :]
        return w + self._join(jnp.matmul(self._split(w), b) + b)

    def recover(self, w: jax.Array) -> jax.Array:
        b = self.block[..., None, :, :, :]
        inverse = jnp.linalg.inv(jnp.eye(b.shape[-1]) + b)
        return self._join(jnp.matmul(self._split(w) - b, inverse))


def miss(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 64,
    variant: Literal["miss", "mini", "bat"] = "miss",
    mini_rank: int = 1,
    dropout: float = 0.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with a MiSS node at each place that `targets` name. Blocks start at zero.

    Raises ValueError for a rank above a weight's inputs, or sizes that the variant cannot divide,
    naming the place.
    """
    at = Selection.of(miss, where)
    if rank < 1 or mini_rank < 1:
        raise ValueError(f"rank and mini_rank must be at least 1, got {rank} and {mini_rank}")
    check_dropout(dropout)
    if variant == "bat" and dropout:
        raise ValueError("the variant 'bat' has no dropout")

    def make(site: Site, key: jax.Array) -> MiSS | BatMiSS:
        lead, n_in, n_out = site.sizes
        if rank > n_in:
            raise ValueError(f"rank={rank} is larger than the {n_in} inputs of {site.path}")
        common = site.common(dropout=dropout, name=at.adapter)
        if variant == "bat":
            site.check_divides(rank, "rank")
            return BatMiSS(**common, block=jnp.zeros((*lead, n_out // rank, rank, rank)))
        if variant == "mini":
            site.check_divides(mini_rank, "mini_rank", inputs=False)
        return MiSS(
            **common, block=jnp.zeros((*lead, rank, mini_rank if variant == "mini" else n_out))
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="miss",
    function=miss,
    nodes=(MiSS, BatMiSS),
    at="matrices",
    title="MiSS",
    follows="Kang and Yin 2024, arXiv:2409.15371; PEFT `MissConfig`",
    differs="Blocks start at zero; inputs that the rank does not divide are padded",
    example={"rank": 4},
    variants=(
        {"variant": "mini", "mini_rank": 2},
        {"variant": "bat"},
        {"rank": 5},
    ),
)
