"""RandLoRA (Albert et al. 2025, arXiv:2502.00987): a full-rank change as a sum of scaled random
low-rank products.

W + s sum_j B_j diag(lambda_j) A diag(gamma_j), with A and B_j random, frozen and shared by all
layers. There are n = ceil(min(in, out) / r) terms, so that the sum can have full rank; A is on the
smaller side, to train less.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Shared
from peft_jax.core.method import Method
from peft_jax.core.reparametrised import (
    Additive,
    Site,
    check_dropout,
    find_sites,
    node,
    place_nodes,
)
from peft_jax.core.where import Selection, Where


@node
class RandLoRA(Additive):
    """lambdas [*lead, r, n], gamma [*lead, n, min(in, out)], scale [*lead]; shared: a [r, 1,
    small'], b [large', n', r].
    """

    trainable: ClassVar[tuple[str, ...]] = ("lambdas", "gamma")
    lambdas: jax.Array
    gamma: jax.Array
    scale: jax.Array

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """([*lead, in, r n], [*lead, r n, out]).

        The two sides list r and n in different orders, as PEFT's flattening does; what trains is
        defined by that.
        """
        n_in, n_out = self.features
        small, large, n = min(n_in, n_out), max(n_in, n_out), self.gamma.shape[-2]
        a = (
            self.shared["a"][..., :small] * self.lambdas[..., None] * self.gamma[..., None, :, :]
        )  # [r, n, small]
        b = self.shared["b"][..., :large, :n, :]
        a, b = a.reshape(*self.lead, -1, small), b.reshape(*self.lead, large, -1)
        return (a.mT, b.mT) if n_in <= n_out else (b, a)

    def delta(self) -> jax.Array:
        return jnp.matmul(*self._factors()) * self.scale[..., None, None]

    def update(self, x: jax.Array) -> jax.Array:
        a, b = self._factors()
        return jnp.matmul(jnp.matmul(x, a.astype(x.dtype)), (b * self.scale).astype(x.dtype))


def randlora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with a RandLoRA node at each place that `targets` name, and the shared bases at the
    top of the tree.

    alpha defaults to 20 times the rank, as in PEFT. Raises ValueError for a rank below 1 or dropout
    outside [0, 1).
    """
    at = Selection.of(randlora, where)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    check_dropout(dropout)
    group = f"randlora_{at.adapter}"
    key, ka, kb = jax.random.split(key, 3)

    def make(site: Site, key: jax.Array) -> RandLoRA:
        lead, n_in, n_out = site.sizes
        n = math.ceil(min(n_in, n_out) / rank)
        return RandLoRA(
            **site.common(dropout=dropout, name=at.adapter, group=group),
            lambdas=jnp.zeros((*lead, rank, n)),
            gamma=jnp.full((*lead, n, min(n_in, n_out)), 1 / max(n, min(n_in, n_out)), jnp.float32),
            scale=jnp.full(lead, (20 * rank if alpha is None else alpha) / rank, jnp.float32),
        )

    sizes = [s.sizes[1:] for s in find_sites(params, **at.places).values()]
    n_in, n_out = max(n for n, _ in sizes), max(n for _, n in sizes)
    small, large = min(n_in, n_out), max(n_in, n_out)

    def unit(k, shape):
        return jax.random.uniform(k, shape, jnp.float32, -math.sqrt(3), math.sqrt(3))  # variance 1

    shared = {
        "a": unit(ka, (rank, 1, small)),
        "b": unit(kb, (large, math.ceil(small / rank), rank)),
    }
    placed = place_nodes(params, key, make, at)
    return {**placed, f"shared_{group}": Shared(trained={}, fixed=shared)}


METHOD = Method(
    name="randlora",
    function=randlora,
    nodes=(RandLoRA,),
    at="matrices",
    title="RandLoRA",
    follows="Albert et al. 2025, arXiv:2502.00987; PEFT `RandLoraConfig`",
    differs="PEFT's `sparse` and `very_sparse` bases are not there",
    example={"rank": 4, "alpha": 4.0},
    variants=({"rank": 5},),
)
