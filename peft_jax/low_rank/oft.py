"""OFT (Qiu et al. 2023, arXiv:2306.07280): the input turned by a block-diagonal orthogonal matrix
before the weight.

Each block is the Cayley transform of a skew-symmetric matrix, exact or by its Neumann series (Qiu
et al. 2025, arXiv:2506.19847, equation 7). With `constrained` (COFT) the skew matrices stay within
a ball of radius `eps`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where


@node
class OFT(Reparametrised):
    """skew [*lead, blocks or 1, b (b - 1) / 2]: the upper triangles, row by row; 1 where blocks
    share one matrix.
    """

    trainable: ClassVar[tuple[str, ...]] = ("skew",)
    skew: jax.Array
    block_size: int = static()
    terms: int = static(default=5)  # of the Neumann series; 0: the exact transform
    constrained: bool = static(default=False)
    eps: float = static(default=6e-5)

    def rotation(self) -> jax.Array:
        """The blocks [*lead, blocks or 1, b, b]; an input row x becomes x R."""
        q = skew_matrices(self.skew, self.block_size)
        if self.constrained:
            q = q + jax.lax.stop_gradient(self._projected(q) - q)
        return cayley(q) if self.terms == 0 else _neumann(q, self.terms)

    def _projected(self, q: jax.Array) -> jax.Array:
        radius = self.eps / jnp.sqrt(q.shape[-3])
        norm = jnp.sqrt(jnp.square(q).sum((-2, -1), keepdims=True))
        return jnp.where(norm <= radius, q, radius * q / jnp.maximum(norm, 1e-30))

    def adapt(self, w: jax.Array) -> jax.Array:
        blocks = w.reshape(*w.shape[:-2], -1, self.block_size, w.shape[-1])
        return jnp.matmul(self.rotation(), blocks).reshape(w.shape)

    def recover(self, w: jax.Array) -> jax.Array:
        blocks = w.reshape(*w.shape[:-2], -1, self.block_size, w.shape[-1])
        rotation = jnp.broadcast_to(self.rotation(), (*blocks.shape[:-1], self.block_size))
        return jnp.linalg.solve(rotation, blocks).reshape(
            w.shape
        )  # the Neumann series is not quite orthogonal

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        blocks = x.reshape(*x.shape[:-1], -1, self.block_size)
        # What differs from one is rounded to x's dtype: cosines near one would be rounded to one.
        turn = (self.rotation() - jnp.eye(self.block_size)).astype(x.dtype)
        shared = turn.shape[0] == 1
        moved = (
            jnp.matmul(blocks, turn[0]) if shared else jnp.einsum("...nk,nkc->...nc", blocks, turn)
        )
        return base(x + moved.reshape(x.shape))


def skew_matrices(upper: jax.Array, size: int) -> jax.Array:
    """Skew-symmetric matrices [..., b, b] from their upper triangles [..., b (b - 1) / 2]."""
    rows, cols = np.triu_indices(size, 1)
    q = jnp.zeros((*upper.shape[:-1], size, size), upper.dtype).at[..., rows, cols].set(upper)
    return q - q.mT


def cayley(q: jax.Array) -> jax.Array:
    """(I - Q) (I + Q)^-1 of skew-symmetric matrices: rotations, in float32."""
    q = q.astype(jnp.float32)
    eye = jnp.eye(q.shape[-1], dtype=q.dtype)
    return jnp.linalg.solve((eye + q).mT, (eye - q).mT).mT


def _neumann(q: jax.Array, terms: int) -> jax.Array:
    """I + 2 Q + 2 Q^2 + ... with the last of `terms` terms once: (I + Q)(I - Q)^-1 to that order.

    As in PEFT, two terms are I + 2 Q, and three are four.
    """
    result, power = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape), q
    terms = 4 if terms == 3 else terms
    for term in range(1, terms):
        last = term == terms - 1 and term > 2
        result = result + (1.0 if last else 2.0) * power
        power = jnp.matmul(power, q)
    return result


def oft(
    params: Any,
    key: jax.Array,
    *,
    block_size: int = 32,
    terms: int = 5,
    constrained: bool = False,
    eps: float = 6e-5,
    share: bool = False,
    **where: Unpack[Where],
) -> Any:
    """`params` with an OFT node at each place that `targets` name.

    `terms` is the length of the Neumann series, 0 for the exact Cayley transform; `share` gives all
    blocks of a weight one matrix. Raises ValueError where `block_size` does not divide a weight's
    inputs, naming the place.
    """
    at = Selection.of(oft, where)
    if block_size < 2 or terms < 0 or terms == 1:
        raise ValueError(
            f"block_size must be at least 2 and terms 0 or at least 2, got {block_size} and {terms}"
        )

    def make(site: Site, key: jax.Array) -> OFT:
        lead, n_in, _ = site.sizes
        site.check_divides(block_size, "block_size", outputs=False)
        blocks = 1 if share else n_in // block_size
        return OFT(
            **site.common(name=at.adapter),
            skew=jnp.zeros((*lead, blocks, block_size * (block_size - 1) // 2)),
            block_size=block_size,
            terms=terms,
            constrained=constrained,
            eps=eps,
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="oft",
    function=oft,
    nodes=(OFT,),
    at="matrices",
    title="OFT",
    follows=(
        "Qiu et al. 2023, arXiv:2306.07280, and 2025, arXiv:2506.19847, equation 7; PEFT "
        "`OFTConfig`"
    ),
    differs="Two terms of the Neumann series are I + 2 Q, and three are four, as PEFT has them",
    example={"block_size": 4},
    variants=(
        {"terms": 0},
        {"terms": 3},
        {"share": True},
        {"constrained": True},
        {"constrained": True, "eps": 0.5},
    ),
)
