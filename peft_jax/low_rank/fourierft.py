"""FourierFT (Gao et al. 2024, arXiv:2405.03003): the change is the inverse 2-D Fourier transform of
a few entries.

The entries' places are the first n of a random permutation, drawn from a seed as Hugging Face PEFT
draws it; only the values train. The change is formed whole for each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.torch_random import Generator


@node
class FourierFT(Additive):
    """spectrum [*lead, n], places [*lead, n] in the flattened [out, in] matrix, scale [*lead]."""

    trainable: ClassVar[tuple[str, ...]] = ("spectrum",)
    spectrum: jax.Array
    places: jax.Array
    scale: jax.Array
    seed: int = static(default=777)

    def delta(self) -> jax.Array:
        dense = scatter(self.spectrum, self.places, self.features)
        return jnp.fft.ifft2(dense).real.mT * self.scale[..., None, None]


def scatter(values: jax.Array, places: jax.Array, features: tuple[int, int]) -> jax.Array:
    """[*lead, out, in] with `values` [*lead, n] at flattened `places`, zero elsewhere."""
    n_in, n_out = features

    def one(v, p):
        return jnp.zeros(n_in * n_out, v.dtype).at[p].set(v)

    for _ in values.shape[:-1]:
        one = jax.vmap(one)
    return one(values, places).reshape(*values.shape[:-1], n_out, n_in)


def draw_places(lead: tuple[int, ...], size: int, count: int, seed: int) -> jax.Array:
    """[*lead, count] of the flattened matrix: the same in every layer, as in PEFT."""
    places = jnp.asarray(Generator(seed).permutation(size, count), jnp.int32)
    return jnp.broadcast_to(places, (*lead, count))


def count_of(site: Site, frequencies: int, pattern: Mapping[str, int]) -> int:
    """How many entries of a matrix train. Raises ValueError where it has fewer, or stacked layers
    differ.
    """
    _, n_in, n_out = site.sizes
    count, *others = sorted(set(site.pattern(frequencies, pattern)))
    if others:
        raise ValueError(
            f"frequencies_pattern gives layers stacked at {site.path} {count} and {others[0]}; "
            "unstack_layers first"
        )
    if not 1 <= count <= n_in * n_out:
        raise ValueError(
            f"frequencies must lie between 1 and {n_in * n_out} at {site.path}, got {count}"
        )
    return count


def fourierft(
    params: Any,
    key: jax.Array,
    *,
    frequencies: int = 1000,
    scale: float = 150.0,
    seed: int = 777,
    frequencies_pattern: Mapping[str, int] | None = None,
    **where: Unpack[Where],
) -> Any:
    """`params` with a FourierFT node of `frequencies` trained entries at each place that `targets`
    name.

    `frequencies_pattern` overrides the number for the places that its keys match. The spectrum
    starts at zero.
    """
    at = Selection.of(fourierft, where)
    pattern = frequencies_pattern or {}

    def make(site: Site, key: jax.Array) -> FourierFT:
        lead, n_in, n_out = site.sizes
        count = count_of(site, frequencies, pattern)
        return FourierFT(
            **site.common(name=at.adapter),
            spectrum=jnp.zeros((*lead, count)),
            places=draw_places(lead, n_in * n_out, count, seed),
            scale=jnp.full(lead, scale, jnp.float32),
            seed=seed,
        )

    patterns = {"frequencies_pattern": pattern}
    return place_nodes(params, key, make, at, patterns=patterns)


METHOD = Method(
    name="fourierft",
    function=fourierft,
    nodes=(FourierFT,),
    at="matrices",
    title="FourierFT",
    follows="Gao et al. 2024, arXiv:2405.03003; PEFT `FourierFTConfig`",
    differs=(
        "The spectrum starts at zero, where the paper and PEFT's default draw it, so that "
        "nothing changes at first; places are PEFT's numbers. Layers stacked together have "
        "one number of frequencies"
    ),
    example={"frequencies": 12},
    variants=(
        {"scale": 20.0},
        {"seed": 1},
        {"frequencies_pattern": {"w": 7}},
    ),
)
