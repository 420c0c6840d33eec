"""DeLoRA (Bini et al. 2025, arXiv:2503.18225): normalised rank-one terms whose strength is one
trained number.

W + diag(w) A diag(lambda / (r ||a_i|| ||b_i||)) B, with w the norm of W's rows (an input's weights)
when it was attached.
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
class DeLoRA(Additive):
    """a [*lead, in, r], b [*lead, r, out], strength [*lead, 1] (lambda), norm [*lead, in]."""

    trainable: ClassVar[tuple[str, ...]] = ("a", "b", "strength")
    a: jax.Array
    b: jax.Array
    strength: jax.Array
    norm: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"a": (into, None), "b": (None, out), "strength": (None,), "norm": (into,)}

    def _scales(self) -> jax.Array:
        """lambda / (r ||a_i|| ||b_i||), [*lead, r]; norms below 1e-4 count as 1e-4."""
        a, b = (_norm(x, axis) for x, axis in ((self.a, -2), (self.b, -1)))
        return self.strength / (self.a.shape[-1] * a * b)

    def delta(self) -> jax.Array:
        return self.norm[..., None] * jnp.matmul(self.a * self._scales()[..., None, :], self.b)

    def update(self, x: jax.Array) -> jax.Array:
        a, b = self.norm[:, None] * self.a, self._scales()[:, None] * self.b
        return jnp.matmul(jnp.matmul(x, a.astype(x.dtype)), b.astype(x.dtype))


def _norm(x: jax.Array, axis: int) -> jax.Array:
    square = jnp.square(x).sum(axis)
    return jnp.sqrt(
        jnp.maximum(square, 1e-8)
    )  # a maximum inside the root, so that zero has no infinite gradient


def delora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    strength: float = 15.0,
    dropout: float = 0.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with a DeLoRA node of rank `rank` at each place that `targets` name; `strength` is
    lambda at the start.

    Raises ValueError for a rank below 1 or dropout outside [0, 1).
    """
    at = Selection.of(delora, where)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    check_dropout(dropout)

    def make(site: Site, key: jax.Array) -> DeLoRA:
        lead, n_in, n_out = site.sizes
        return DeLoRA(
            **site.common(dropout=dropout, name=at.adapter),
            a=kaiming(key, (*lead, n_in, rank), n_in),
            b=jnp.zeros((*lead, rank, n_out)),
            strength=jnp.full((*lead, 1), strength, jnp.float32),
            norm=jnp.linalg.norm(site.matrix(), axis=-1),
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="delora",
    function=delora,
    nodes=(DeLoRA,),
    at="matrices",
    title="DeLoRA",
    follows="Bini et al. 2025, arXiv:2503.18225; PEFT `DeloraConfig`",
    differs=(
        "The base's norms are those at the time it was attached, saved with the adapter, as "
        "in PEFT: a base that is pruned or quantized later keeps them"
    ),
    example={"rank": 2},
    variants=({"strength": 3.0},),
)
