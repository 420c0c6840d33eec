"""BOFT (Liu et al. 2024, arXiv:2311.06243): OFT with butterfly factors, and a trained scale of each
output.

R = P_m D_m P_m^T ... P_1 D_1 P_1^T with block-diagonal rotations D_i and permutations P_i that let
blocks of one factor mix what those of the one before kept apart (section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes, scaled
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.oft import cayley


@node
class BOFT(Reparametrised):
    """r [*lead, factors, blocks, b, b], of which the skew-symmetric half counts; s [*lead, out]."""

    trainable: ClassVar[tuple[str, ...]] = ("r", "s")
    r: jax.Array
    s: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"s": (out,)}

    def _rotations(self) -> jax.Array:
        return cayley(0.5 * (self.r - self.r.mT))

    def _turn(self, w: jax.Array, rotations: jax.Array, factors: Sequence[int]) -> jax.Array:
        """P_i D_i P_i^T for each factor i in turn, times w [*lead, in, n]."""
        count, blocks, b = rotations.shape[-4:-1]
        turns = (rotations - jnp.eye(b)).astype(
            w.dtype
        )  # what differs from one, which half precision would round to one
        for i in factors:
            order = butterfly(blocks * b, blocks, b, i, count)
            rows = w[..., order, :].reshape(*w.shape[:-2], blocks, b, w.shape[-1])
            turned = jnp.matmul(turns[..., i, :, :, :], rows).reshape(w.shape)
            w = w + turned[..., np.argsort(order), :]
        return w

    def adapt(self, w: jax.Array) -> jax.Array:
        return self._turn(w, self._rotations(), range(self.r.shape[-4])) * self.s[..., None, :]

    def recover(self, w: jax.Array) -> jax.Array:
        back = self._rotations().mT  # orthogonal
        return self._turn(w / self.s[..., None, :], back, range(self.r.shape[-4])[::-1])

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        back = self._rotations().mT
        turned = self._turn(
            x.reshape(-1, x.shape[-1]).T, back, range(self.r.shape[-4])[::-1]
        )  # (x R)^T = R^T x^T
        return scaled(base(turned.T.reshape(x.shape)), self.s)


def butterfly(size: int, blocks: int, block_size: int, factor: int, factors: int) -> np.ndarray:
    """The order of `size` features before factor number `factor`: within groups, even half-blocks,
    then odd ones.
    """
    order = np.arange(size)
    if factors == 1:
        return order
    half, group = block_size // 2, size // (blocks // 2**factor)
    pieces = np.arange(group).reshape(-1, half)
    within = np.concatenate([pieces[0::2], pieces[1::2]]).ravel()
    return (order.reshape(-1, group)[:, within]).ravel()


def boft(
    params: Any,
    key: jax.Array,
    *,
    block_size: int = 4,
    factors: int = 1,
    **where: Unpack[Where],
) -> Any:
    """`params` with a BOFT node of `factors` butterfly factors at each place that `targets` name.

    Raises ValueError where `block_size` (with several factors, times 2^(factors - 1), and even)
    does not divide a weight's inputs, naming the place.
    """
    at = Selection.of(boft, where)
    if block_size < 2 or factors < 1 or (factors > 1 and block_size % 2):
        raise ValueError(
            f"block_size must be at least 2, and even with several factors, got {block_size}"
        )

    def make(site: Site, key: jax.Array) -> BOFT:
        lead, n_in, n_out = site.sizes
        site.check_divides(
            block_size * 2 ** (factors - 1), "block_size * 2^(factors - 1)", outputs=False
        )
        shape = (*lead, factors, n_in // block_size, block_size, block_size)
        return BOFT(**site.common(name=at.adapter), r=jnp.zeros(shape), s=jnp.ones((*lead, n_out)))

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="boft",
    function=boft,
    nodes=(BOFT,),
    at="matrices",
    title="BOFT",
    follows="Liu et al. 2024, arXiv:2311.06243, section 4; PEFT `BOFTConfig`",
    differs="No multiplicative dropout of blocks",
    example={"block_size": 4, "factors": 2},
    variants=({"factors": 1},),
)
