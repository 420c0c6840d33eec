"""`quantize`: weights of a tree replaced by quantized ones."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.coverage import choose, ledger, reached
from peft_jax.core.packing import codes_per_unit
from peft_jax.core.reparametrised import Reparametrised, Site, find_sites
from peft_jax.core.select import OUTPUT_EMBEDDING, Targets, check_patterns, matches
from peft_jax.core.tree import map_places, places
from peft_jax.core.values import check_finite, is_traced
from peft_jax.core.weight import Axes, Layout, Weight, materialize, matrix_shape, to_matrix
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantized import Quantized, packed
from peft_jax.quantization.rounding import (
    FRACTIONAL,
    NEEDS,
    ROUNDINGS,
    WITHOUT_DATA,
    Rounded,
    check_rounding,
    needed_statistics,
    plain_rounding,
)

Statistics = Mapping[str, Mapping[str, jax.Array]]  # name of the statistic -> path -> array
EMBEDDING: tuple[Axes, Axes] = (
    (-1,),
    (-2,),
)  # an embedding [V, D] as the matrix of a head that is tied to it


@ledger()
def quantize(
    params: Any,
    format: Format | str | Mapping[str, Format | str] = "nf4",
    *,
    rounding: str = "nearest",
    statistics: Statistics | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """`params` with a Quantized weight at each place that `targets` name; in nodes that have a
    base, there.

    `format` is a Format or its name, or maps targets to them (the first key that matches a place
    counts; places that none matches stay as they are). `rounding` is nearest, stochastic, gptq,
    awq, smoothquant or hqq, with its `options`. `statistics` maps those that the rounding needs
    (`NEEDS`) to what `calibrate` gives for them; static activations need "max_abs". Embeddings
    count as heads: scales run along D. Layers of a stack are rounded one by one. Experts and
    weights that no token of the statistics reached are rounded to nearest, which is said.

    Raises ValueError naming the place for a block that does not divide its inputs, missing or
    misshapen statistics, weights that are not finite, and for unknown formats, roundings and
    options.
    """
    check_rounding(rounding, options)
    layout = {**embedding_layout(params), **(layout or {})}
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    formats = _formats(format, sites)
    for path, chosen in formats.items():
        sites[path].check_whole("are quantized together")
        check_fits(path, chosen, sites[path].sizes[1])
        check_statistics(sites[path], chosen, rounding, statistics or {})

    def place(path: str, w: Any) -> Any:
        if path not in formats:
            return w
        needed = {name: of[path] for name, of in (statistics or {}).items() if path in of}
        site = sites[path]
        axes = {"in_axes": site.in_axes, "out_axes": site.out_axes}
        return quantize_base(path, w, formats[path], rounding, needed, seed, **axes, **options)

    return map_places(place, params)


def embedding_layout(params: Any) -> dict[str, tuple[Axes, Axes]]:
    """The layout of embeddings by their name."""
    return {
        p: EMBEDDING
        for p in places(params)
        if p.rpartition("/")[2] in ("embedding", OUTPUT_EMBEDDING)
    }


def quantize_base(
    path: str,
    w: Any,
    format: Format,
    rounding: str,
    statistics: Mapping[str, jax.Array],
    seed: int,
    **rest: Any,
) -> Any:
    """`w`, an array or a Weight, quantized; where it is a node over a base, the innermost base
    is.
    """
    if isinstance(w, Reparametrised):
        return w.replace(
            base=quantize_base(path, w.base, format, rounding, statistics, seed, **rest)
        )
    if isinstance(w, Quantized):
        raise ValueError(f"{path} is quantized already")
    return quantize_weight(
        path, w, format, rounding=rounding, statistics=statistics, seed=seed, **rest
    )


def quantize_weight(
    path: str,
    w: Any,
    format: Format,
    *,
    rounding: str = "nearest",
    statistics: Mapping[str, jax.Array] | None = None,
    seed: int = 0,
    in_axes: Axes = (-2,),
    out_axes: Axes = (-1,),
    **options: Any,
) -> Quantized:
    """The Quantized weight of one array or Weight; `statistics` maps names to this place's arrays.
    Stochastic rounding draws by `seed` and path. See `quantize`.
    """
    statistics, key = (
        statistics or {},
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())),
    )
    check_fits(path, format, matrix_shape(w.shape, in_axes, out_axes)[1])
    array = materialize(w)
    matrices, there = (
        to_matrix(array, in_axes, out_axes),
        _reached(path, array.shape, statistics, rounding, in_axes, out_axes),
    )
    rounded = _round_stack(
        matrices, dict(statistics), key, there, format, rounding, tuple(options.items())
    )
    check_finite(rounded.scale, f"{path} holds numbers that are not finite")
    node = assemble(
        rounded,
        format,
        tuple(w.shape[a] for a in in_axes),
        tuple(w.shape[a] for a in out_axes),
        in_axes,
        out_axes,
        w.dtype,
    )
    if getattr(format, "activations", None) == "static":
        node = node.replace(
            input_scale=static_scale(path, statistics["max_abs"], format, node.smooth)
        )
    return node


def static_scale(
    path: str, largest: jax.Array, format: Any, smooth: jax.Array | None = None
) -> jax.Array:
    """The scale [*lead] of quantized inputs whose `largest` [*lead, in] are known and that are
    divided by `smooth`; 0 where no token was seen.
    """
    how: dict[str, Any] = {"method": "static activations", "instead": "a scale for each token"}
    there = reached(path, [largest], largest.shape[:-1], **how)
    own = largest if smooth is None else largest / smooth
    return choose(there, own, jnp.zeros_like(own)).max(-1) / format.largest


def assemble(
    rounded: Rounded,
    format: Format,
    in_sizes: tuple[int, ...],
    out_sizes: tuple[int, ...],
    in_axes: Axes = (-2,),
    out_axes: Axes = (-1,),
    dtype: Any = jnp.float32,
) -> Quantized:
    """A Quantized weight from codes [*lead, in, out] and what belongs to them."""
    zero = rounded.zero
    if zero is not None and not jnp.issubdtype(zero.dtype, jnp.integer) and _whole(zero, format):
        zero = zero.astype(jnp.uint8)
    return Quantized(
        codes=packed(rounded.codes, format),
        scale=format.store_scale(rounded.scale),
        zero=zero,
        order=rounded.order,
        smooth=rounded.smooth,
        format=format,
        logical_dtype=jnp.dtype(dtype),
        in_sizes=in_sizes,
        out_sizes=out_sizes,
        in_axes=in_axes,
        out_axes=out_axes,
    )


def _whole(zero: jax.Array, format: Format) -> bool:
    """Whether zero points are whole numbers that codes can be; of traced ones nobody knows."""
    return not is_traced(zero) and bool(
        (jnp.round(zero) == zero).all() & (zero >= 0).all() & (zero < 2**format.bits).all()
    )


def _reached(
    path: str,
    shape: tuple[int, ...],
    statistics: Mapping[str, jax.Array],
    rounding: str,
    in_axes: Axes,
    out_axes: Axes,
) -> jax.Array | None:
    """bool [*lead], which matrices a rounding has the statistics of; None where all, or where it
    needs none.
    """
    if rounding not in NEEDS:
        return None
    found, lead = (
        [statistics[name] for name in NEEDS[rounding]],
        matrix_shape(shape, in_axes, out_axes)[0],
    )
    return reached(
        path, found, lead, method=f"rounding {rounding!r}", instead=f"{WITHOUT_DATA[rounding]!r}"
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _round_stack(
    matrices: jax.Array,
    statistics: dict[str, jax.Array],
    key: jax.Array,
    there: jax.Array | None,
    format: Format,
    rounding: str,
    options: Any,
) -> Rounded:
    """`rounding` of matrices [*lead, in, out], one after the other; where not `there` [*lead], what
    needs no statistics.
    """
    lead = matrices.shape[:-2]
    function, needs_key = ROUNDINGS[rounding], rounding == "stochastic"
    wanted = {name: statistics[name] for name in NEEDS.get(rounding, ())}

    def one(inputs: Any) -> Rounded:
        w, of, key, there = inputs
        w = w.astype(jnp.float32)
        given = {**({"statistics": of} if of else {}), **({"key": key} if needs_key else {})}
        found = function(w, format, **given, **dict(options))
        found = (
            found
            if there is None
            else choose(there, found, plain_rounding(rounding, w, format, found))
        )
        if found.zero is None or rounding in FRACTIONAL:
            return found
        return found._replace(zero=found.zero.astype(jnp.uint8))

    if not lead:
        return one((matrices, wanted, key, there))
    count = math.prod(lead)
    flat = jax.tree.map(
        lambda a: a.reshape(count, *a.shape[len(lead) :]), (matrices, wanted, there)
    )
    found = jax.lax.map(one, (*flat[:2], jax.random.split(key, count), flat[2]))
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)


def _formats(
    format: Format | str | Mapping[str, Format | str], sites: Mapping[str, Site]
) -> dict[str, Format]:
    if not isinstance(format, Mapping):
        return dict.fromkeys(sites, make_format(format))
    check_patterns(sites, format=format)
    chosen = {
        p: next((make_format(f) for key, f in format.items() if matches(p, key)), None)
        for p in sites
    }
    return {p: f for p, f in chosen.items() if f is not None}


def check_fits(path: str, format: Format, n_in: int) -> None:
    """Raise ValueError where a format's blocks or bytes do not divide the inputs of the weight at
    `path`.
    """
    unit = codes_per_unit(format.bits)
    if format.block_size is not None and (format.block_size < 1 or n_in % format.block_size):
        raise ValueError(
            f"block_size={format.block_size} does not divide the {n_in} inputs of {path}; choose "
            "another or exclude the place"
        )
    if (format.block_size or n_in) % unit:
        raise ValueError(
            f"{format.bits}-bit codes are packed by {unit}, which does not divide the blocks of "
            f"{path} ({n_in} inputs)"
        )


def check_statistics(site: Site, format: Format, rounding: str, statistics: Statistics) -> None:
    """Raise ValueError where the statistics that a rounding to `format` needs of a site are missing
    or misshapen.
    """
    lead, n_in, _ = site.sizes
    for name in needed_statistics(rounding, format):
        if site.path not in statistics.get(name, {}):
            raise ValueError(
                f"{site.path} has no statistics {name!r}, which rounding {rounding!r} of this "
                "format needs; pass "
                f"statistics={{{name!r}: calibrate(..., statistic={name!r})}} for the same targets"
            )
        shape = (*lead, n_in, n_in) if name == "covariance" else (*lead, n_in)
        if (found := np.shape(statistics[name][site.path])) != shape:
            raise ValueError(
                f"statistics {name!r} of {site.path} have shape {found}, expected {shape}"
            )


def dequantize(params: Any) -> Any:
    """Quantized weights replaced by the arrays that they stand for, in nodes that have a base
    too.
    """

    def back(w: Any) -> Any:
        if isinstance(w, Reparametrised):
            return w.replace(base=back(w.base))
        return w.materialize() if isinstance(w, Quantized) else w

    return map_places(lambda _, w: back(w), params)


def bits_per_weight(w: Weight) -> float:
    """Bits that a weight's arrays hold for each logical weight."""
    arrays = [a for a in jax.tree.leaves(w) if hasattr(a, "dtype")]
    return 8 * sum(a.size * a.dtype.itemsize for a in arrays) / math.prod(w.shape)
