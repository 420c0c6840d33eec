"""The masked weight: a base of which some entries are zero and stay zero, with one bit an entry
that says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.packing import pack_padded, unpack_padded
from peft_jax.core.partition import trainable_mask
from peft_jax.core.reparametrised import Product, Reparametrised, node
from peft_jax.core.tree import map_places
from peft_jax.core.values import check_concrete
from peft_jax.core.weight import (
    Axes,
    Trainable,
    Weight,
    from_matrix,
    materialize,
    matmul,
    static,
    to_matrix,
    unrounded,
)
from peft_jax.pruning.pattern import Pattern


@node
class Masked(Reparametrised):
    """`base` where `mask` is 1, zero elsewhere. mask: uint8 [*lead, ceil(in / 8), out], eight
    inputs to a byte.

    An array as base has its zeros in place, so a product costs what it costs without a mask. Over a
    base that trains, or another Weight (quantized, with an update inside), the mask is applied
    whenever it is used, and gradients of masked entries are zero. `pattern` says what the mask
    follows, if anything.
    """

    stochastic: ClassVar[bool] = False
    pruned: ClassVar[bool] = True
    mask: jax.Array
    pattern: Pattern = static(default=None)
    name: str = static(default="")  # no adapter

    def replace(self, **changes: Any) -> Masked:
        """A copy with some fields changed; an array that becomes the base gets its zeros."""
        new = super().replace(**changes)
        fresh = isinstance(new.base, (jax.Array, np.ndarray)) and new.base is not self.base
        if not fresh:
            return new
        return super(Masked, new).replace(base=new.with_zeros(cast("jax.Array", new.base)))

    @property
    def whole(self) -> bool:
        return any(jax.tree.leaves(trainable_mask(self.base)))

    def kept(self) -> jax.Array:
        """bool [*lead, in, out]: which entries are kept."""
        return unpack_padded(self.mask, 1, self.features[0]).astype(bool)

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"mask": (into, out)}

    def adapt(self, w: jax.Array) -> jax.Array:
        return jnp.where(self.kept(), w, 0.0)

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        if not isinstance(self.base, Weight):
            return base(x)

        def masked(x: jax.Array, w: Masked) -> jax.Array:
            return w.by_parts(
                x, lambda x, m: jnp.matmul(x, to_matrix(m, w.in_axes, w.out_axes).astype(x.dtype))
            )

        return jax.checkpoint(masked)(
            x, self
        )  # made again in the backward pass: no dense copy outlives a product

    def by_parts(
        self, x: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        if not isinstance(self.base, Weight):
            return product(x, self.base)
        inner = base_of(self.base)
        if inner is self.base or jnp.finfo(x.dtype).bits >= 32:
            return product(x, self.unrounded())
        bare = self.with_zeros(unrounded(inner))  # the change is that of the adapters inside
        return product(x, bare) + product(x, self.unrounded() - bare)

    def materialize(self) -> jax.Array:
        return super().materialize() if isinstance(self.base, Weight) else self.base

    def transposed(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        def product(x, m):
            return matmul(x, m, in_axes=in_axes, out_axes=out_axes, precision=precision)

        return jax.checkpoint(lambda x, w: w.by_parts(x, product))(x, self)

    def merge(self) -> Masked:
        """Masked still, over the merged base: zeros stay what they are."""
        if not isinstance(self.base, Weight):
            return self
        return self.replace(base=self.base.merge())

    def with_zeros(self, array: jax.Array) -> jax.Array:
        """An array of this weight's shape with zeros where the mask is 0."""
        masked = self.adapt(to_matrix(array, self.in_axes, self.out_axes))
        return from_matrix(masked, self.shape, self.in_axes, self.out_axes).astype(array.dtype)

    def unmerge(self, merged: Any) -> Masked:
        if not isinstance(self.base, Weight):
            return self.replace(base=merged.base)
        base = self.base.unmerge(merged.base)
        return self.replace(base=_inmost(base, self.with_zeros))

    def train(self) -> Masked:
        base = self.base.train() if isinstance(self.base, Weight) else Trainable(self.base)
        return self.replace(base=base)


def _inmost(w: Any, change: Any) -> Any:
    """`w` with its innermost array, under nodes that have a base, changed."""
    if isinstance(w, Reparametrised):
        return w.replace(base=_inmost(w.base, change))
    return w if isinstance(w, Weight) else change(w)


def masked(
    w: Any,
    kept: jax.Array,
    *,
    in_axes: Axes = (-2,),
    out_axes: Axes = (-1,),
    pattern: Pattern = None,
) -> Masked:
    """The Masked weight of an array or Weight, given bool [*lead, in, out] of what is kept."""
    node = Masked(
        base=None, mask=pack_padded(kept, 1), in_axes=in_axes, out_axes=out_axes, pattern=pattern
    )
    return node.replace(base=w)


def mask_from_zeros(
    params: Any, layout: Mapping[str, tuple[Axes, Axes]] | None = None, *, least: float = 0.05
) -> Any:
    """`params` with each matrix of which at least a share `least` is zero made a Masked weight of
    those zeros.

    For checkpoints that were pruned elsewhere, or before: their zeros are then kept. Raises
    ValueError under `jax.jit`.
    """

    def place(path: str, w: Any) -> Any:
        if (
            isinstance(w, Weight)
            or not hasattr(w, "ndim")
            or w.ndim < 2
            or not path.endswith(("kernel", "embedding"))
        ):
            return w
        axes = dict(
            zip(("in_axes", "out_axes"), (layout or {}).get(path, ((-2,), (-1,))), strict=True)
        )
        check_concrete(
            "which weights become masked depends on their zeros: mask_from_zeros does not run", w
        )
        kept = to_matrix(w, **axes) != 0
        return masked(w, kept, **axes) if float(1 - kept.mean()) >= least else w

    return map_places(place, params)


def mask_updates(params: Any) -> Any:
    """Adapters over masked weights masked as well: `LoRA(Masked(w))` becomes `Masked(LoRA(w))`, so
    that merging keeps every zero (SparsePEFT, Munoz et al. 2024, arXiv:2410.03750).

    Do it before training. The update is formed and masked in each product: a step then costs what
    full fine-tuning costs.
    """

    def inside(w: Any) -> Any:
        if not isinstance(w, Reparametrised) or isinstance(w, Masked):
            return w
        inner = inside(w.base)
        return inner.replace(base=w.replace(base=inner.base)) if isinstance(inner, Masked) else w

    return map_places(lambda _, w: inside(w), params)


def base_of(w: Any) -> Any:
    """What adapters lie over: an array, a Masked or another Weight."""
    while isinstance(w, Reparametrised) and not isinstance(w, Masked):
        w = w.base
    return w


def zeros_of(w: Any) -> jax.Array:
    """The share of zeros of a weight, for each of its leading axes' entries."""
    if isinstance(w, Masked):
        return 1.0 - w.kept().mean((-2, -1))
    array = materialize(w)
    axes = (-2, -1) if array.ndim >= 2 else None
    return (array == 0).mean(axes)
