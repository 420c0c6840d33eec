"""VB-LoRA (Li et al. 2024, arXiv:2405.15179): LoRA whose factors are mixtures of vectors from one
bank.

Each piece of length v of a row of A or column of B is a softmax over the k largest of its logits
(equation 3) times those vectors. The bank trains and is shared by all layers (`Shared`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Shared
from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, check_dropout, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where


@node
class VBLoRA(Additive):
    """logits_a [*lead, r, in/v, n], logits_b [*lead, out/v, r, n]; shared: bank [n, v]."""

    trainable: ClassVar[tuple[str, ...]] = ("logits_a", "logits_b")
    logits_a: jax.Array
    logits_b: jax.Array
    top_k: int = static(default=2)

    def _mixture(self, logits: jax.Array) -> jax.Array:
        """[..., n] -> [..., v]."""
        bank = self.shared["bank"]
        top, chosen = jax.lax.top_k(logits, self.top_k)
        lead = len(self.lead)

        def look_up(bank, ids):
            return bank[ids]

        for _ in range(lead):
            look_up = jax.vmap(look_up)
        return (jax.nn.softmax(top)[..., None] * look_up(bank, chosen)).sum(-2)

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        a, b = (
            self._mixture(self.logits_a),
            self._mixture(self.logits_b),
        )  # [r, in/v, v], [out/v, r, v]
        a = a.reshape(*a.shape[:-2], -1).mT
        b = jnp.moveaxis(b, -2, -3).reshape(*self.lead, b.shape[-2], -1)
        return a, b

    def delta(self) -> jax.Array:
        return jnp.matmul(*self._factors())

    def update(self, x: jax.Array) -> jax.Array:
        a, b = self._factors()
        return jnp.matmul(jnp.matmul(x, a.astype(x.dtype)), b.astype(x.dtype))


def vblora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 4,
    vectors: int = 256,
    length: int = 256,
    top_k: int = 2,
    bank_bound: float = 0.02,
    logits_std: float = 0.1,
    dropout: float = 0.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with a VB-LoRA node at each place that `targets` name, and the bank at the top of
    the tree.

    The bank has `vectors` vectors of length `length`, uniform within `bank_bound`; logits start
    normal with `logits_std`. The change is small but not zero at first, as in the paper. Raises
    ValueError where `length` does not divide a weight's sizes, naming the place.
    """
    at = Selection.of(vblora, where)
    if min(rank, vectors, length) < 1 or not 1 <= top_k <= vectors:
        raise ValueError(
            "rank, vectors and length must be at least 1, and top_k between 1 and vectors"
        )
    check_dropout(dropout)
    group = f"vblora_{at.adapter}"
    key, bank_key = jax.random.split(key)

    def make(site: Site, key: jax.Array) -> VBLoRA:
        lead, n_in, n_out = site.sizes
        site.check_divides(length, "length")
        ka, kb = jax.random.split(key)
        return VBLoRA(
            **site.common(dropout=dropout, name=at.adapter, group=group),
            logits_a=logits_std * jax.random.normal(ka, (*lead, rank, n_in // length, vectors)),
            logits_b=logits_std * jax.random.normal(kb, (*lead, n_out // length, rank, vectors)),
            top_k=top_k,
        )

    bank = jax.random.uniform(bank_key, (vectors, length), jnp.float32, -bank_bound, bank_bound)
    placed = place_nodes(params, key, make, at)
    return {**placed, f"shared_{group}": Shared(trained={"bank": bank}, fixed={})}


METHOD = Method(
    name="vblora",
    function=vblora,
    nodes=(VBLoRA,),
    at="matrices",
    title="VB-LoRA",
    follows="Li et al. 2024, arXiv:2405.15179, equation 3; PEFT `VBLoRAConfig`",
    differs="The change is small and not zero at first, as in the paper",
    identity=False,
    example={"vectors": 8, "length": 4},
    variants=(
        {"rank": 3},
        {"top_k": 3},
        {"bank_bound": 0.3, "logits_std": 1.0},
    ),
)
