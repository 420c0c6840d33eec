"""QA-LoRA (Xu et al. 2023, arXiv:2309.14717): LoRA whose update is the same for all inputs of a
block.

So it can be folded into the zero points of a base in integers, and what was trained over 4 bits
stays in 4 bits. The input is averaged over its blocks and scaled by their number, as in Hugging
Face PEFT, then meets A [blocks, r] and B [r, out].
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, check_dropout, node, place_nodes
from peft_jax.core.where import Biased, Selection
from peft_jax.quantization.formats import Int
from peft_jax.quantization.quantized import Quantized


@node
class QALoRA(Additive):
    """a [*lead, blocks, r], b [*lead, r, out], scale [*lead]."""

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    a: jax.Array
    b: jax.Array
    scale: jax.Array

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"b": (None, out)}

    @property
    def block(self) -> int:
        """How many inputs share a row of `a`."""
        return self.features[0] // self.a.shape[-2]

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """(A, B)."""
        return self.a, self.b

    def _by_block(self) -> jax.Array:
        """The update of each block's inputs, [*lead, blocks, out]."""
        share = self.a.shape[-2] / self.block
        return jnp.matmul(self.a, self.b) * (share * self.scale[..., None, None])

    def delta(self) -> jax.Array:
        return jnp.repeat(self._by_block(), self.block, axis=-2)

    def update(self, x: jax.Array) -> jax.Array:
        pooled = x.reshape(*x.shape[:-1], -1, self.block).mean(-1) * self.a.shape[-2]
        return jnp.matmul(
            jnp.matmul(pooled, self.a.astype(x.dtype)), (self.b * self.scale).astype(x.dtype)
        )

    def merge(self) -> Any:
        """The quantized base with other zero points, where it has blocks of ours; else an array."""
        base, format = self.base, getattr(self.base, "format", None)
        same = (
            isinstance(format, Int)
            and format.block_size == self.block
            and base.codes.dtype == jnp.uint8
        )
        plain = same and base.order is None and base.smooth is None and self.gate is None
        if not plain or (base.in_axes, base.out_axes) != (self.in_axes, self.out_axes):
            return self.materialize()
        assert isinstance(format, Int)
        zero = (
            jnp.full(base.scale.shape, format.levels // 2 + 1) if base.zero is None else base.zero
        )
        moved = zero.astype(jnp.float32) - self._by_block() / base.scale.astype(jnp.float32)
        return base.replace(zero=moved, format=dataclasses.replace(format, symmetric=False))


def qalora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    block_size: int | None = None,
    dropout: float = 0.0,
    **where: Unpack[Biased],
) -> Any:
    """`params` with a QALoRA node at each place that `targets` name.

    `block_size` defaults to that of the quantized base; over one with such blocks `merge` stays
    quantized. `alpha` defaults to the rank. Raises ValueError naming a place whose inputs it does
    not divide, or that has no blocks to take it from.
    """
    at = Selection.of(qalora, where)
    check_dropout(dropout)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def make(site: Site, key: jax.Array) -> QALoRA:
        lead, n_in, n_out = site.sizes
        size = block_size or (
            site.base.format.block_size if isinstance(site.base, Quantized) else None
        )
        if size is None:
            raise ValueError(f"{site.path} has no blocks; give QA-LoRA a block_size")
        site.check_divides(size, "block_size", outputs=False)
        bound = (n_in // size) ** -0.5
        return QALoRA(
            **site.common(dropout=dropout, name=at.adapter),
            a=jax.random.uniform(key, (*lead, n_in // size, rank), jnp.float32, -bound, bound),
            b=jnp.zeros((*lead, rank, n_out), jnp.float32),
            scale=jnp.full(lead, (rank if alpha is None else alpha) / rank, jnp.float32),
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="qalora",
    function=qalora,
    nodes=(QALoRA,),
    at="matrices",
    title="QA-LoRA",
    follows="Xu et al. 2023, arXiv:2309.14717; PEFT `use_qalora`",
    differs=(
        "Inputs are averaged over a block and multiplied by the number of blocks, as in PEFT; "
        "the paper adds them, which differs by a constant factor"
    ),
    example={"rank": 2, "block_size": 8},
    variants=(
        {"alpha": 5.0},
        {"block_size": 4},
    ),
)
