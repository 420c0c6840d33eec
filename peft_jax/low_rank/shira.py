"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): a few single entries of the weight train, the
rest stays.

r (in + out) entries, as many as LoRA of rank r would train, chosen at random or by magnitude.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, node, place_nodes
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.fourierft import scatter


@node
class SHiRA(Additive):
    """values [*lead, n], places [*lead, n] in the flattened [out, in] matrix."""

    trainable: ClassVar[tuple[str, ...]] = ("values",)
    values: jax.Array
    places: jax.Array

    def delta(self) -> jax.Array:
        return scatter(self.values, self.places, self.features).mT


def shira(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 32,
    mask: Literal["random", "magnitude"] = "random",
    **where: Unpack[Where],
) -> Any:
    """`params` with a SHiRA node of rank * (in + out) trained entries at each place that `targets`
    name.

    `mask` chooses them at random (by `key`) or takes the largest. Raises ValueError where the
    weight has fewer.
    """
    at = Selection.of(shira, where)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def make(site: Site, key: jax.Array) -> SHiRA:
        lead, n_in, n_out = site.sizes
        count = rank * (n_in + n_out)
        if count > n_in * n_out:
            raise ValueError(
                f"rank={rank} asks for {count} entries of {site.path}, which has {n_in * n_out}"
            )
        shape = (*lead, n_in * n_out)
        score = (
            jnp.abs(site.matrix().mT).reshape(shape)
            if mask == "magnitude"
            else jax.random.uniform(key, shape)
        )
        places = jnp.sort(jax.lax.top_k(score, count)[1]).astype(jnp.int32)
        return SHiRA(
            **site.common(name=at.adapter), values=jnp.zeros((*lead, count)), places=places
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="shira",
    function=shira,
    nodes=(SHiRA,),
    at="matrices",
    title="SHiRA",
    follows="Bhardwaj et al. 2024, arXiv:2406.13175; PEFT `ShiraConfig`",
    differs=(
        "Masks are random or by magnitude; those of the paper that need gradients are not there"
    ),
    example={"rank": 1},
    variants=({"mask": "magnitude"},),
)
