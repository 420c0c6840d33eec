"""HRA (Yuan et al. 2024, arXiv:2405.17484): the input reflected r times by trained Householder
vectors.

The r reflections are one product of rank r: H_1 ... H_r = I - U T U^T (compact WY, Schreiber and
Van Loan 1989). With `orthogonal` the vectors are first made orthonormal (the paper's Gram-Schmidt
variant), I - 2 Q Q^T. That is never the identity: r directions are turned around from the start,
and the vectors start independent, since equal ones span no r of them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.init import kaiming


@node
class HRA(Reparametrised):
    """u [*lead, in, r]; neighbours start equal, so that their reflections cancel, unless they are
    made orthonormal.
    """

    trainable: ClassVar[tuple[str, ...]] = ("u",)
    u: jax.Array
    orthogonal: bool = static(default=False)

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"u": (into, None)}

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """(U, T^T U^T) with R^T = I - U T^T U^T, where PEFT's weight [out, in] becomes W R."""
        u = self.u.astype(jnp.float32)
        u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
        gram = u.mT @ u
        if self.orthogonal:
            return u, 2 * jnp.linalg.solve(gram, u.mT)
        upper = jnp.triu(gram, 1) + 0.5 * jnp.eye(gram.shape[-1])
        return u, jax.scipy.linalg.solve_triangular(upper, u.mT, trans=1)

    def adapt(self, w: jax.Array) -> jax.Array:
        u, v = self._factors()
        return w - u @ (v @ w)

    def recover(self, w: jax.Array) -> jax.Array:
        u, v = self._factors()
        return w - v.mT @ (u.mT @ w)  # the inverse of an orthogonal matrix is its transpose

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        u, v = (m.astype(x.dtype) for m in self._factors())
        return base(x - jnp.matmul(jnp.matmul(x, u), v))


def hra(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    orthogonal: bool = False,
    **where: Unpack[Where],
) -> Any:
    """`params` with an HRA node of `rank` reflections at each place that `targets` name.

    The rank is even, so that nothing changes at first; with `orthogonal`, which cannot start so, it
    is any up to the inputs.
    """
    at = Selection.of(hra, where)
    if rank < 1 or (rank % 2 and not orthogonal):
        raise ValueError(f"rank must be even, so that the reflections cancel at first, got {rank}")

    def make(site: Site, key: jax.Array) -> HRA:
        lead, n_in, _ = site.sizes
        if orthogonal and rank > n_in:
            raise ValueError(
                f"rank={rank} asks for more orthonormal vectors than the {n_in} inputs of "
                f"{site.path}"
            )
        each = 1 if orthogonal else 2
        u = jnp.repeat(kaiming(key, (*lead, n_in, rank // each), rank // each), each, axis=-1)
        return HRA(**site.common(name=at.adapter), u=u, orthogonal=orthogonal)

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="hra",
    function=hra,
    nodes=(HRA,),
    at="matrices",
    title="HRA",
    follows="Yuan et al. 2024, arXiv:2405.17484; PEFT `HRAConfig`",
    differs=(
        "The reflections are one product of rank r (compact WY). With `orthogonal` (PEFT's "
        "`apply_GS`) the vectors start independent, where PEFT's start in equal pairs: "
        "Gram-Schmidt makes rounding noise, or NaN, of those. That variant never starts as "
        "the identity"
    ),
    example={"rank": 2},
    variants=(
        {"orthogonal": True},
        {"orthogonal": True, "rank": 3},
    ),
)
