"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454): W + A diag(d) B diag(b), A and B random, frozen
and shared by all layers.

A and B lie once in the tree (`Shared`), as large as the largest weight needs; a weight uses their
first rows and columns. They are drawn as Hugging Face PEFT draws them from a seed, so adapters may
leave them out.
"""

from __future__ import annotations

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
from peft_jax.low_rank.torch_random import Generator


@node
class VeRA(Additive):
    """d [*lead, r], b [*lead, out]; shared: a [in', r] and b [r, out'], at least as large as the
    weight.
    """

    trainable: ClassVar[tuple[str, ...]] = ("d", "b")
    d: jax.Array
    b: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"d": (None,), "b": (out,)}

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        n_in, n_out = self.features
        a, b = self.shared["a"][..., :n_in, :], self.shared["b"][..., :n_out]
        return a * self.d[..., None, :], b * self.b[..., None, :]

    def delta(self) -> jax.Array:
        return jnp.matmul(*self._factors())

    def update(self, x: jax.Array) -> jax.Array:
        a, b = self._factors()
        return jnp.matmul(jnp.matmul(x, a.astype(x.dtype)), b.astype(x.dtype))


def projections(rank: int, n_in: int, n_out: int, seed: int) -> dict[str, jax.Array]:
    """The shared A [in, r] and B [r, out] of a seed: Kaiming-uniform, as PEFT draws them."""
    generator = Generator(seed)
    a = generator.kaiming((rank, n_in), n_in)
    b = generator.kaiming((n_out, rank), rank)
    return {"a": jnp.asarray(a.T), "b": jnp.asarray(b.T)}


def vera(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 256,
    seed: int = 0,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with a VeRA node at each place that `targets` name, and the shared projections at
    the top of the tree.

    `seed` draws the projections; d starts at `d_initial`, b at zero. Raises ValueError for a rank
    below 1 or dropout outside [0, 1).
    """
    at = Selection.of(vera, where)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    check_dropout(dropout)
    group = f"vera_{at.adapter}"

    def make(site: Site, key: jax.Array) -> VeRA:
        lead, _, n_out = site.sizes
        common = site.common(dropout=dropout, name=at.adapter, group=group)
        return VeRA(
            **common, d=jnp.full((*lead, rank), d_initial, jnp.float32), b=jnp.zeros((*lead, n_out))
        )

    sizes = [s.sizes[1:] for s in find_sites(params, **at.places).values()]
    shared = projections(rank, max(n for n, _ in sizes), max(n for _, n in sizes), seed)
    placed = place_nodes(params, key, make, at)
    return {**placed, f"shared_{group}": Shared(trained={}, fixed=shared)}


METHOD = Method(
    name="vera",
    function=vera,
    nodes=(VeRA,),
    at="matrices",
    title="VeRA",
    follows="Kopiczko et al. 2024, arXiv:2310.11454; PEFT `VeraConfig`",
    differs="The projections are drawn with PyTorch's generator, to PEFT's numbers",
    example={"rank": 4},
    variants=(
        {"seed": 1},
        {"d_initial": 1.0},
    ),
)
