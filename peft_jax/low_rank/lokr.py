"""LoKr (Yeh et al. 2024, LyCORIS, arXiv:2309.14859): W + s kron(W1, W2), each factor full or of
rank r.

in = m n and out = o k are factorised as near to squares as `factor` allows; W1 is [m, o], W2 [n,
k]. The product with an input takes two small products and never forms the Kronecker product.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.init import kaiming

Factor = jax.Array | tuple[jax.Array, jax.Array]  # whole, or two factors of rank r


def _whole(w: Factor) -> jax.Array:
    return jnp.matmul(*w) if isinstance(w, tuple) else w


@node
class LoKr(Additive):
    """w1 [*lead, m, o] and w2 [*lead, n, k], or pairs of factors of them; scale [*lead]."""

    trainable: ClassVar[tuple[str, ...]] = ("w1", "w2")
    w1: Factor
    w2: Factor
    scale: jax.Array
    rank: int = static(
        default=8
    )  # as asked for, also where both factors are whole; kept for export
    factor: int = static(default=-1)

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"scale": ()}

    def delta(self) -> jax.Array:
        w1, w2 = _whole(self.w1), _whole(self.w2)
        product = jnp.einsum("...mo,...nk->...mnok", w1, w2).reshape(*self.lead, *self.features)
        return product * self.scale[..., None, None]

    def update(self, x: jax.Array) -> jax.Array:
        w1, w2 = (_whole(self.w1) * self.scale).astype(x.dtype), _whole(self.w2).astype(x.dtype)
        y = jnp.matmul(x.reshape(*x.shape[:-1], w1.shape[0], w2.shape[0]), w2)  # [..., m, k]
        return jnp.einsum("...mk,mo->...ok", y, w1).reshape(*x.shape[:-1], -1)


def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = size and m <= n, m as large as sqrt(size) or `factor` allows (LyCORIS'
    rule).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    divisors = [m for m in range(1, int(size**0.5) + 1) if size % m == 0 and m <= limit]
    return divisors[-1], size // divisors[-1]


def lokr(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    decompose_both: bool = False,
    factor: int = -1,
    **where: Unpack[Where],
) -> Any:
    """`params` with a LoKr node at each place that `targets` name; alpha defaults to the rank.

    A factor of W2 (with `decompose_both` of W1 too) larger than twice the rank is held as two of
    rank `rank`. `factor` bounds W1's sizes. Raises ValueError for a rank below 1.
    """
    at = Selection.of(lokr, where)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def make(site: Site, key: jax.Array) -> LoKr:
        lead, n_in, n_out = site.sizes
        (m, n), (o, k) = factorise(n_in, factor), factorise(n_out, factor)
        k1, k2, k3 = jax.random.split(key, 3)
        w1, w2 = jnp.zeros((*lead, m, o)), kaiming(k2, (*lead, n, k), n)
        if decompose_both and rank < max(m, o) / 2:
            w1 = (kaiming(k1, (*lead, m, rank), m), jnp.zeros((*lead, rank, o)))
        if rank < max(n, k) / 2:
            w2 = (kaiming(k2, (*lead, n, rank), n), kaiming(k3, (*lead, rank, k), rank))
        scale = jnp.full(lead, (rank if alpha is None else alpha) / rank, jnp.float32)
        return LoKr(
            **site.common(name=at.adapter), w1=w1, w2=w2, scale=scale, rank=rank, factor=factor
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="lokr",
    function=lokr,
    nodes=(LoKr,),
    at="matrices",
    title="LoKr",
    follows="LyCORIS, arXiv:2309.14859; PEFT `LoKrConfig`",
    differs=(
        "W1 starts at zero; PEFT's `lycoris` start is not there, nor its decomposition of "
        "convolutions"
    ),
    example={"rank": 1},
    variants=(
        {"alpha": 3.0},
        {"decompose_both": True},
        {"factor": 4},
        {"rank": 40},
    ),
)
