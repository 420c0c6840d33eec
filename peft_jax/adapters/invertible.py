"""Invertible adapters after the embedding (Pfeiffer et al. 2020, arXiv:2005.00052): an additive
coupling (NICE, Dinh et al. 2015, arXiv:1410.8516), whose inverse goes before a head that is tied to
the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapters.adapter import affine
from peft_jax.adapters.bottleneck import ACTIVATIONS, check_options
from peft_jax.core.attachment import Attachment, attach, module_at
from peft_jax.core.method import Method
from peft_jax.core.placing import token_embedding
from peft_jax.core.reparametrised import node
from peft_jax.core.weight import static
from peft_jax.core.where import Embedded, Selection

Net = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@node
class Invertible(Attachment):
    """Two nets of two layers (weight, bias): `first` [D - D/2 -> D/2] and `second` [D/2 -> D -
    D/2], at the embedding.
    """

    trainable: ClassVar[tuple[str, ...]] = ("first", "second")
    biases: ClassVar[tuple[str, ...]] = (r"\w+/\d+/1",)
    first: Any
    second: Any
    activation: str = static(default="relu")
    name: str = static(default="default")
    frozen: bool = static(default=False)

    def _net(self, net: Net, x: jax.Array) -> jax.Array:
        (w0, b0), (w1, b1) = net
        return affine(ACTIVATIONS[self.activation](affine(x, w0, b0)), w1, b1)

    def forward(self, x: jax.Array) -> jax.Array:
        """x [..., D] through the coupling."""
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        a = a + self._net(self.first, b)
        return jnp.concatenate([a, b + self._net(self.second, a)], axis=-1)

    def inverse(self, y: jax.Array) -> jax.Array:
        """What `forward` made y [..., D] of."""
        half = y.shape[-1] // 2
        a, b = y[..., :half], y[..., half:]
        b = b - self._net(self.second, a)
        return jnp.concatenate([a - self._net(self.first, b), b], axis=-1)

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.forward(call(*args, **kwargs))


@node
class Inverse(Attachment):
    """At the embedding as a head: queries go through the inverse of the `Invertible` beside it,
    which `bind` hands over.
    """

    method: ClassVar[str] = "attend"
    coupling: Invertible | None = None
    name: str = static(default="default")
    frozen: bool = static(default=False)

    def linked(self, params: Any, path: str) -> Self:
        return self.replace(
            coupling=module_at(params, path.rpartition("/")[0])[f"invertible_{self.name}"]
        )

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.coupling is not None  # `linked` filled it
        return call(self.coupling.inverse(args[0]), *args[1:], **kwargs)


def invertible(
    params: Any,
    key: jax.Array,
    *,
    reduction_factor: float = 2.0,
    activation: str = "relu",
    inverse: bool = True,
    **where: Unpack[Embedded],
) -> Any:
    """`params` with an invertible adapter after the token embedding, and (`inverse`) its inverse
    where that is the head.

    Each net has half the features over `reduction_factor` hidden units, and ends in zeros, so that
    nothing changes at first. Raises ValueError for an unknown activation and an embedding that is
    not found or has an invertible adapter of that name.
    """
    at = Selection.of(invertible, where)
    check_options(activation, "none", "zero", 0.0)
    D = token_embedding(params, at.embedding)[1].shape[-1]
    keys = jax.random.split(key)

    def net(key: jax.Array, n_in: int, n_out: int) -> Net:
        h = max(1, int(n_in // reduction_factor))
        first = jax.random.uniform(key, (n_in, h), jnp.float32, -(n_in**-0.5), n_in**-0.5)
        return (first, jnp.zeros(h)), (jnp.zeros((h, n_out)), jnp.zeros(n_out))

    half = D // 2
    coupling = Invertible(
        first=net(keys[0], D - half, half),
        second=net(keys[1], half, D - half),
        activation=activation,
        name=at.adapter,
    )
    return place_invertible(params, coupling, at.embedding, inverse=inverse)


def place_invertible(
    params: Any, coupling: Invertible, embedding: str | None, *, inverse: bool = True
) -> Any:
    """`params` with a coupling at the token embedding."""
    path, _ = token_embedding(params, embedding)
    nodes: dict[str, Any] = {f"invertible_{coupling.name}": coupling}
    if inverse:
        nodes[f"inverse_{coupling.name}"] = Inverse(name=coupling.name)
    return attach(params, {path: nodes})


METHOD = Method(
    name="invertible",
    function=invertible,
    nodes=(Invertible, Inverse),
    at="input",
    title="invertible adapters",
    follows=(
        "Pfeiffer et al. 2020, arXiv:2005.00052; NICE, arXiv:1410.8516; AdapterHub "
        "`inv_adapter=nice`"
    ),
    differs="The inverse goes before a tied head alone",
)
