"""LoHa (Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098): W + s (A1 B1) * (A2 B2), an element-wise
product.

The change has rank up to r^2 from 2 r (in + out) parameters. The products are formed whole for each
call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, node, place_nodes
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.init import kaiming


@node
class LoHa(Additive):
    """a1, a2 [*lead, in, r]; b1, b2 [*lead, r, out]; scale [*lead]."""

    trainable: ClassVar[tuple[str, ...]] = ("a1", "b1", "a2", "b2")
    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    scale: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {
            "a1": (into, None),
            "a2": (into, None),
            "b1": (None, out),
            "b2": (None, out),
            "scale": (),
        }

    def delta(self) -> jax.Array:
        return (
            jnp.matmul(self.a1, self.b1)
            * jnp.matmul(self.a2, self.b2)
            * self.scale[..., None, None]
        )


def loha(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **where: Unpack[Where],
) -> Any:
    """`params` with a LoHa node of rank `rank` at each place that `targets` name; alpha defaults to
    the rank.

    The patterns override both for the places that their keys match. Raises ValueError for a rank
    below 1.
    """
    at = Selection.of(loha, where)
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    for r in (rank, *rank_pattern.values()):
        if r < 1:
            raise ValueError(f"rank must be at least 1, got {r}")

    def make(site: Site, key: jax.Array) -> LoHa:
        lead, n_in, n_out = site.sizes
        ranks, alphas = (
            site.pattern(rank, rank_pattern),
            site.pattern(rank if alpha is None else alpha, alpha_pattern),
        )
        r = max(ranks)
        k1, k2, k3 = jax.random.split(key, 3)
        small = (
            1 / jnp.sqrt(site.by_layer(ranks))[..., None, None]
        )  # PEFT's bound of a factor whose inputs are the ranks
        used = (jnp.arange(r) < site.by_layer(ranks)[..., None]).astype(
            jnp.float32
        )  # layers may differ in rank
        return LoHa(
            **site.common(name=at.adapter),
            a1=kaiming(k1, (*lead, n_in, r), n_in) * used[..., None, :],
            b1=kaiming(k2, (*lead, r, n_out), 1) * small * used[..., :, None],
            a2=jnp.zeros((*lead, n_in, r)),
            b2=kaiming(k3, (*lead, r, n_out), 1) * small * used[..., :, None],
            scale=site.by_layer([a / r for a, r in zip(alphas, ranks, strict=True)]),
        )

    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    return place_nodes(params, key, make, at, patterns=patterns)


METHOD = Method(
    name="loha",
    function=loha,
    nodes=(LoHa,),
    at="matrices",
    title="LoHa",
    follows="FedPara, arXiv:2108.06098; PEFT `LoHaConfig`",
    differs="PEFT's effective decomposition of convolutions is not there: a kernel is flattened",
    example={"rank": 2},
    variants=(
        {"alpha": 5.0},
        {"rank_pattern": {"w": 3}},
        {"alpha_pattern": {"w": 7.0}},
    ),
)
