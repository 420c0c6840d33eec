"""Quantization-aware training: the weights train in full precision and act as if they were
quantized.

The forward pass rounds (Jacob et al. 2017, arXiv:1712.05877); gradients pass the rounding straight
through (Bengio et al. 2013, arXiv:1308.3432). Of a format that quantizes activations inputs are
rounded too. `merge` gives the quantized weights, with the very outputs of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.coverage import ledger
from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes
from peft_jax.core.tree import is_node
from peft_jax.core.weight import matmul, ragged_matmul, row_groups, static
from peft_jax.core.where import Selection, Trained
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantize import (
    Statistics,
    assemble,
    check_fits,
    check_statistics,
    embedding_layout,
    quantize_weight,
    static_scale,
)
from peft_jax.quantization.quantized import (
    Quantized,
    of_rows,
    round_inputs,
    rounds_inputs,
    straight_through,
    weight_only,
)
from peft_jax.quantization.rounding import Rounded, needed_statistics


@node
class FakeQuantized(Reparametrised):
    """`base`, an array that trains, rounded to `format` wherever it is used, as its inputs are if
    the format says so.

    `input_scale` [*lead]: see `Quantized`. With rounded inputs the product is the merged weight's
    own: another order of operations could round an input on the boundary of two codes the other
    way. Gradients are those of the product of the rounded inputs and weights.
    """

    trainable: ClassVar[tuple[str, ...]] = ("base",)
    stochastic: ClassVar[bool] = False
    input_scale: jax.Array | None = None
    format: Format = static()

    @property
    def whole(self) -> bool:
        return True

    def adapt(self, w: jax.Array) -> jax.Array:
        return w + jax.lax.stop_gradient(_round_trip(w, self.format) - w)

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        if not rounds_inputs(self.format):
            return super().product(x, base)
        rounded = round_inputs(x, self.format, self.input_scale)
        y = super().product(straight_through(x, rounded), base)
        return straight_through(y, matmul(x, self.quantized()))

    def ragged_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        if not rounds_inputs(self.format):
            return super().ragged_matmul(x, sizes)
        group = jnp.minimum(row_groups(len(x), sizes), len(sizes) - 1)
        rounded = round_inputs(x, self.format, of_rows(self.input_scale, group))
        y = super().ragged_matmul(straight_through(x, rounded), sizes)
        return straight_through(y, ragged_matmul(x, self.quantized(), sizes))

    def quantized(self) -> Quantized:
        """What merging gives in a format that rounds inputs, as matrices [*lead, in, out], within a
        trace too.
        """
        w = self.base_matrix()
        scale, zero = self.format.fit(w)
        rounded = Rounded(self.format.encode(w, scale, zero), scale)
        n_in, n_out = self.features
        node = assemble(rounded, self.format, (n_in,), (n_out,), dtype=self.dtype)
        return node.replace(input_scale=self.input_scale)

    def merge(self) -> Quantized:
        node = quantize_weight(
            self.name,
            self.base,
            weight_only(self.format),
            in_axes=self.in_axes,
            out_axes=self.out_axes,
        )
        return node.replace(format=self.format, input_scale=self.input_scale)


def _round_trip(w: jax.Array, format: Format) -> jax.Array:
    """A matrix [*lead, in, out] as `Quantized` would give it back."""
    *lead, n_in, n_out = w.shape
    blocks = w.reshape(*lead, -1, format.block_size or n_in, n_out)
    scale, zero = format.fit(blocks)
    codes = format.encode(blocks, scale, zero)
    kept = format.load_scale(format.store_scale(scale[..., 0, :]))
    return (format.decode(codes, zero) * kept[..., None, :]).reshape(w.shape)


def statistics_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the `statistics` that `qat` needs with these options."""
    format = make_format(options.get("format", "int4"), **(options.get("options") or {}))
    return needed_statistics("nearest", format)


@ledger()
def qat(
    params: Any,
    key: jax.Array,
    *,
    format: str = "int4",
    options: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    **where: Unpack[Trained],
) -> Any:
    """`params` with the weights that `targets` name trained as they will be once quantized to
    `format` with `options`.

    Static activations need `statistics={"max_abs": calibrate(..., statistic="max_abs")}`, as in
    `quantize`. `key` is not used. Raises ValueError naming the place where the format does not fit,
    statistics are missing, or the weight is no array.
    """
    layout = {**embedding_layout(params), **(where.get("layout") or {})}
    at = Selection.of(qat, {**where, "layout": layout})
    chosen = make_format(format, **(options or {}))

    def make(site: Site, key: jax.Array) -> FakeQuantized:
        site.check_whole("are quantized together")
        check_fits(site.path, chosen, site.sizes[1])
        if is_node(site.base):
            raise ValueError(
                f"{site.path} is a {type(site.base).__name__}; quantization-aware training starts "
                "from arrays"
            )
        check_statistics(site, chosen, "nearest", statistics or {})
        scale = None
        if needed_statistics("nearest", chosen):
            scale = static_scale(site.path, (statistics or {})["max_abs"][site.path], chosen)
        return FakeQuantized(**site.common(name=site.path), format=chosen, input_scale=scale)

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="qat",
    function=qat,
    nodes=(FakeQuantized,),
    at="matrices",
    title="quantization-aware training",
    follows="Jacob et al. 2017, arXiv:1712.05877; straight through, arXiv:1308.3432",
    differs=(
        "Formats are those of `quantize`; with `activations` the inputs are rounded as the "
        "merged weight rounds them"
    ),
    identity=False,
    whole=True,
    needs=statistics_of,
    layout=embedding_layout,
    example={"format": "int8"},
    variants=(
        {"format": "int4", "options": {"block_size": 8}},
        {"format": "nf4", "options": {"block_size": 16}},
    ),
)
