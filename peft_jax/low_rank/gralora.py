"""GraLoRA (Jung et al. 2025, arXiv:2505.20355): the weight in k x k blocks, each with its own LoRA
of rank r / k.

With a hybrid rank, a plain LoRA of that rank is added. The scale is alpha / (r + hybrid rank).
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, check_dropout, node, place_nodes
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.init import kaiming


@node
class GraLoRA(Additive):
    """a [*lead, k, in/k, r], b [*lead, k, r, out/k], scale [*lead]; hybrid ([*lead, in, h], [*lead,
    h, out]) or None.

    Block (i, j) of the change is a[i][:, its r/k columns j] b[j][its r/k rows i].
    """

    trainable: ClassVar[tuple[str, ...]] = ("a", "b", "hybrid")
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    hybrid: tuple[jax.Array, jax.Array] | None = None

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"scale": ()}

    def _blocks(self) -> tuple[jax.Array, jax.Array]:
        """a as [*lead, i, in/k, j, r/k] and b as [*lead, j, i, r/k, out/k]."""
        k, r = self.a.shape[-3], self.a.shape[-1]
        a = self.a.reshape(*self.a.shape[:-1], k, r // k)
        b = self.b.reshape(*self.b.shape[:-2], k, r // k, self.b.shape[-1])
        return a, b

    def delta(self) -> jax.Array:
        a, b = self._blocks()
        product = jnp.einsum("...inju,...jiuo->...injo", a, b).reshape(*self.lead, *self.features)
        if self.hybrid is not None:
            product = product + jnp.matmul(*self.hybrid)
        return product * self.scale[..., None, None]

    def update(self, x: jax.Array) -> jax.Array:
        a, b = self._blocks()
        a, b = a.astype(x.dtype), (b * self.scale).astype(x.dtype)
        low = jnp.einsum("...in,inju->...jiu", x.reshape(*x.shape[:-1], a.shape[0], -1), a)
        y = jnp.einsum("...jiu,jiuo->...jo", low, b).reshape(*x.shape[:-1], -1)
        if self.hybrid is not None:
            u, v = self.hybrid
            y = y + jnp.matmul(jnp.matmul(x, u.astype(x.dtype)), (v * self.scale).astype(x.dtype))
        return y


def gralora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 32,
    alpha: float = 64.0,
    blocks: int = 2,
    hybrid_rank: int = 0,
    dropout: float = 0.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with a GraLoRA node of `blocks` x `blocks` blocks at each place that `targets` name.

    Raises ValueError where `blocks` does not divide the rank or a weight's sizes, naming the place.
    """
    at = Selection.of(gralora, where)
    if rank < 1 or blocks < 1 or rank % blocks or hybrid_rank < 0:
        raise ValueError(
            f"rank must be a positive multiple of blocks={blocks} and hybrid_rank not negative, "
            f"got {rank}"
        )
    check_dropout(dropout)

    def make(site: Site, key: jax.Array) -> GraLoRA:
        lead, n_in, n_out = site.sizes
        site.check_divides(blocks, "blocks")
        k1, k2 = jax.random.split(key)
        hybrid = None
        if hybrid_rank:
            hybrid = (
                kaiming(k2, (*lead, n_in, hybrid_rank), n_in),
                jnp.zeros((*lead, hybrid_rank, n_out)),
            )
        return GraLoRA(
            **site.common(dropout=dropout, name=at.adapter),
            a=kaiming(k1, (*lead, blocks, n_in // blocks, rank), n_in // blocks),
            b=jnp.zeros((*lead, blocks, rank, n_out // blocks)),
            scale=jnp.full(lead, alpha / (rank + hybrid_rank), jnp.float32),
            hybrid=hybrid,
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="gralora",
    function=gralora,
    nodes=(GraLoRA,),
    at="matrices",
    title="GraLoRA",
    follows="Jung et al. 2025, arXiv:2505.20355; PEFT `GraloraConfig`",
    differs="The scale counts the hybrid rank, as in PEFT",
    example={"rank": 4, "alpha": 4.0},
    variants=(
        {"blocks": 4},
        {"hybrid_rank": 2},
    ),
)
