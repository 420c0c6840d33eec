"""DoRA (Liu et al. 2024, arXiv:2402.09353): a magnitude per output, and LoRA on the direction.

W' = m * (W + s A B) / ||W + s A B||, norms over the input axis (equation 5), without a gradient
through the norm (section 4.3). m starts as ||W||, so nothing changes at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Site, check_dropout, node, place_nodes, scaled
from peft_jax.core.where import Biased, Selection
from peft_jax.low_rank.lora import LoRA, Ranks


@node
class DoRA(LoRA):
    """A LoRA with magnitude [*lead, out]. Norms are of the base as it is: pruned, quantized or
    trained since, they follow.
    """

    trainable: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")
    magnitude: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {**super().array_specs(into, out), "magnitude": (out,)}

    def _factor(self, direction: jax.Array) -> jax.Array:
        """m / ||W + s A B|| [*lead, out] of the direction [*lead, in, out]; the norm is a constant
        in the backward pass.
        """
        return self.magnitude / _divisor(jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=-2)))

    def adapt(self, w: jax.Array) -> jax.Array:
        direction = w + self.delta()
        return direction * self._factor(direction)[..., None, :]

    def recover(self, w: jax.Array) -> jax.Array:
        """With u = W'/m a unit vector a column and t = ||W + d||: ||t u - d|| = ||W|| gives t.

        A merge loses the length, ||W||, which is read off the node's own base.
        """
        u, d = w / self.magnitude[..., None, :], self.delta()
        along, length = (u * d).sum(-2), jnp.linalg.norm(self.base_matrix(), axis=-2)
        t = along + jnp.sqrt(jnp.square(along) - jnp.square(d).sum(-2) + jnp.square(length))
        return t[..., None, :] * u - d

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        dropped = self.drop(x)
        y = base(dropped)
        direction = y.astype(jnp.float32) + self.update(dropped)  # rounded once, when it is scaled
        result = (direction * (self.magnitude / self._direction_norm())).astype(x.dtype)
        return result if dropped is x else result + base(x) - y  # dropout acts on the change alone

    def _direction_norm(self) -> jax.Array:
        """||W + s A B|| over inputs, [out], from ||W|| and products of rank r: the sum is never
        formed.
        """
        w, a, b = (
            jax.lax.stop_gradient(m)
            for m in (self.base_matrix(), *self.scaled_factors(jnp.float32))
        )
        cross = (jnp.matmul(a.T, w) * b).sum(0)  # <W, s A B> a column
        square = (jnp.matmul(a.T @ a, b) * b).sum(0)
        return _divisor(jnp.sqrt(jnp.maximum(jnp.square(w).sum(0) + 2 * cross + square, 0.0)))

    def transposed(self, x: jax.Array, **axes: Any) -> jax.Array:
        return super(LoRA, self).transposed(x, **axes)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        return scaled(super().take(ids, dtype), self.magnitude / self._direction_norm())


def _divisor(norm: jax.Array) -> jax.Array:
    """The norm, and 1 for an output that is zero altogether (a pruned one): it stays zero, where
    PEFT divides 0 by 0.
    """
    return jnp.where(norm > 0, norm, 1.0)


def dora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    **where: Unpack[Biased],
) -> Any:
    """`params` with a DoRA node at each place that `targets` name; options as for `lora`."""
    at = Selection.of(dora, where)
    ranks = Ranks(rank, alpha, rank_pattern or {}, alpha_pattern or {}, rslora)
    check_dropout(dropout)

    def make(site: Site, key: jax.Array) -> DoRA:
        a, b, scale = ranks.factors(site, key, init)
        norm = jnp.linalg.norm(site.matrix(), axis=-2)
        common = site.common(dropout=dropout, name=at.adapter)
        return DoRA(**common, a=a, b=b, scale=scale, magnitude=norm, rslora=rslora)

    patterns = {"rank_pattern": ranks.rank_pattern, "alpha_pattern": ranks.alpha_pattern}
    return place_nodes(params, key, make, at, patterns=patterns)


METHOD = Method(
    name="dora",
    function=dora,
    nodes=(DoRA,),
    at="matrices",
    title="DoRA",
    follows="Liu et al. 2024, arXiv:2402.09353, equation 5 and section 4.3; PEFT `use_dora`",
    differs=(
        "The norm is computed from the base in each call, as in PEFT, by products of rank r "
        "without forming W + s A B; it has no gradient, in the merged array neither. Over "
        "bfloat16 the norm stays float32"
    ),
    example={"rank": 2, "alpha": 4.0},
    variants=(
        {"alpha": 5.0},
        {"rslora": True, "alpha": 3.0},
        {"rank_pattern": {"w": 3}},
        {"alpha_pattern": {"w": 7.0}},
        {"init": "gaussian"},
        {"dropout": 0.5},
    ),
)
