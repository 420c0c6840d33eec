"""C3A (Chen et al. 2025, arXiv:2407.19342): the change is block-circulant, and its product a
circular convolution.

A block of size b is given by b numbers, and multiplied by fast Fourier transforms. The change is
divided by the number of inputs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, node, place_nodes
from peft_jax.core.where import Selection, Where


@node
class C3A(Additive):
    """kernel [*lead, out/b, in/b, b]."""

    trainable: ClassVar[tuple[str, ...]] = ("kernel",)
    kernel: jax.Array

    def delta(self) -> jax.Array:
        """Entry (i, o) of a block is kernel[(o - i) mod b], on the inputs' reversed spectrum as
        PEFT has it.
        """
        b = self.kernel.shape[-1]
        shift = (jnp.arange(b)[:, None] - jnp.arange(b)[None, :]) % b
        blocks = self.kernel[..., shift]  # [out/b, in/b, b (in), b (out)]
        n_in, n_out = self.features
        return jnp.einsum("...mnio->...nimo", blocks).reshape(*self.lead, n_in, n_out) / n_in

    def update(self, x: jax.Array) -> jax.Array:
        b = self.kernel.shape[-1]
        pieces = jnp.fft.ifft(x.reshape(*x.shape[:-1], -1, b).astype(jnp.float32))
        y = jnp.einsum("...nb,mnb->...mb", pieces, jnp.fft.fft(self.kernel))
        return (jnp.fft.fft(y).real.reshape(*x.shape[:-1], -1) / x.shape[-1]).astype(x.dtype)


def c3a(
    params: Any,
    key: jax.Array,
    *,
    block_size: int = 256,
    init: Literal["zeros", "gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform",
    **where: Unpack[Where],
) -> Any:
    """`params` with a C3A node at each place that `targets` name. Only `init="zeros"` changes
    nothing at first.

    Raises ValueError where `block_size` does not divide a weight's sizes, naming the place.
    """
    at = Selection.of(c3a, where)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")

    def make(site: Site, key: jax.Array) -> C3A:
        lead, n_in, n_out = site.sizes
        site.check_divides(block_size, "block_size")
        shape = (*lead, n_out // block_size, n_in // block_size, block_size)
        bound = {
            "kaiming_uniform": (1 / n_in) ** 0.5,
            "xavier_uniform": (6 / (n_in + n_out)) ** 0.5,
        }.get(init, 0.0)
        kernel = (
            jax.random.normal(key, shape)
            if init == "gaussian"
            else jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        )
        return C3A(**site.common(name=at.adapter), kernel=kernel)

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="c3a",
    function=c3a,
    nodes=(C3A,),
    at="matrices",
    title="C3A",
    follows="Chen et al. 2025, arXiv:2407.19342; PEFT `C3AConfig`",
    differs=(
        "Starts as PEFT does by default, which changes the model a little; `init=zeros` does not"
    ),
    example={"block_size": 4, "init": "zeros"},
    variants=(
        {"init": "xavier_uniform"},
        {"init": "gaussian"},
        {"init": "kaiming_uniform"},
    ),
)
