"""Quantization-aware training: the weights train in full precision and act as if they were quantized.

The forward pass rounds (Jacob et al. 2017, arXiv:1712.05877); gradients pass the rounding straight through (Bengio et al. 2013,
arXiv:1308.3432). `merge` gives the quantized weights, with the very outputs of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from peft_jax.core.reparametrised import Reparametrised, Site, node, place_nodes
from peft_jax.core.tree import Targets, is_node
from peft_jax.core.weight import Layout, static
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantize import check_fits, embedding_layout, quantize_weight
from peft_jax.quantization.quantized import Quantized


@node
class FakeQuantized(Reparametrised):
    """`base`, an array that trains, rounded to `format` wherever it is used."""

    trainable: ClassVar[tuple[str, ...]] = ("base",)
    stochastic: ClassVar[bool] = False
    format: Format = static()

    @property
    def whole(self) -> bool:
        return True

    def adapt(self, w: jax.Array) -> jax.Array:
        return w + jax.lax.stop_gradient(_round_trip(w, self.format) - w)

    def merge(self) -> Quantized:
        return quantize_weight(self.name, self.base, self.format, in_axes=self.in_axes, out_axes=self.out_axes)


def _round_trip(w: jax.Array, format: Format) -> jax.Array:
    """A matrix [*lead, in, out] as `Quantized` would give it back."""
    *lead, n_in, n_out = w.shape
    blocks = w.reshape(*lead, -1, format.block_size or n_in, n_out)
    scale, zero = format.fit(blocks)
    codes = format.encode(blocks, scale, zero)
    kept = format.load_scale(format.store_scale(scale[..., 0, :]))
    return (format.decode(codes, zero) * kept[..., None, :]).reshape(w.shape)


def qat(
    params: Any,
    key: jax.Array,
    *,
    format: str = "int4",
    options: Mapping[str, Any] | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    bias: str = "none",
    modules_to_save: Targets = (),
    layout: Layout | None = None,
) -> Any:
    """`params` with the weights that `targets` name trained as they will be once quantized to `format` with `options`.

    `key` is not used. Raises ValueError naming the place where the format does not fit or the weight is no array.
    """
    chosen = make_format(format, **(options or {}))
    layout = {**embedding_layout(params), **(layout or {})}

    def make(site: Site, key: jax.Array) -> FakeQuantized:
        site.check_whole("are quantized together")
        check_fits(site.path, chosen, site.sizes[1])
        if is_node(site.base):
            raise ValueError(f"{site.path} is a {type(site.base).__name__}; quantization-aware training starts from arrays")
        return FakeQuantized(**site.common(name=site.path), format=chosen)

    rest: dict[str, Any] = {"targets": targets, "exclude": exclude, "layout": layout, "bias": bias}
    return place_nodes(params, key, make, modules_to_save=modules_to_save, **rest)
