"""HiRA (Huang et al. 2025, ICLR, "HiRA: parameter-efficient Hadamard high-rank adaptation"): W + W
* (A B).

The change takes the base's rank, not r, and is formed whole for each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import (
    Product,
    Reparametrised,
    Site,
    check_dropout,
    node,
    place_nodes,
)
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.lora import Ranks


@node
class HiRA(Reparametrised):
    """a [*lead, in, r], b [*lead, r, out]."""

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    a: jax.Array
    b: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"a": (into, None), "b": (None, out)}

    def adapt(self, w: jax.Array) -> jax.Array:
        return w * (1 + jnp.matmul(self.a, self.b))

    def recover(self, w: jax.Array) -> jax.Array:
        return w / (1 + jnp.matmul(self.a, self.b))

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        change = self.base_matrix() * jnp.matmul(self.a, self.b)
        return base(x) + jnp.matmul(self.drop(x), change.astype(x.dtype))


def hira(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 32,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    **where: Unpack[Where],
) -> Any:
    """`params` with a HiRA node of rank `rank` at each place that `targets` name; see `lora` for
    the options.
    """
    at = Selection.of(hira, where)
    ranks = Ranks(rank, None, rank_pattern or {}, {}, False)
    check_dropout(dropout)

    def make(site: Site, key: jax.Array) -> HiRA:
        a, b, _ = ranks.factors(site, key, "kaiming")
        return HiRA(**site.common(dropout=dropout, name=at.adapter), a=a, b=b)

    patterns = {"rank_pattern": ranks.rank_pattern}
    return place_nodes(params, key, make, at, patterns=patterns)


METHOD = Method(
    name="hira",
    function=hira,
    nodes=(HiRA,),
    at="matrices",
    title="HiRA",
    follows="Huang et al. 2025 (ICLR), W + W * (A B); PEFT `HiraConfig`",
    differs="An embedding starts with A zero and B normal, as PEFT's",
    example={"rank": 2},
    variants=({"rank_pattern": {"w": 3}},),
)
