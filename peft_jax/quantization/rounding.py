"""Rounding: how a matrix gets its codes. Nearest, stochastic, GPTQ, AWQ, SmoothQuant and HQQ.

Each is a function `(w [in, out], format, *, key, statistics, **options) -> Rounded`, float32.
`statistics` are those of the matrix's inputs that `NEEDS` names, from `calibrate`: "covariance"
[in, in], "mean_abs" [in], "max_abs" [in].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.calibrate import Statistic
from peft_jax.core.hessian import damped, inverse_factor
from peft_jax.quantization.formats import Format, Int


class Rounded(NamedTuple):
    """Codes [in, out], scale and zero [groups, out], and what `Quantized` says of order [in] and
    smooth [in].
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    order: jax.Array | None = None
    smooth: jax.Array | None = None


Statistics = Mapping[str, jax.Array]


def nearest(w: jax.Array, format: Format) -> Rounded:
    """Each weight to the nearest value, with the scale that the format's own rule gives."""
    return _encode(w, format, *format.fit(_blocks(w, format)))


def stochastic(w: jax.Array, format: Format, *, key: jax.Array) -> Rounded:
    """Up or down at random, so that the expected value is the weight."""
    return _encode(
        w, format, *format.fit(_blocks(w, format)), noise=jax.random.uniform(key, w.shape)
    )


ActivationOrder = Literal["static", "dynamic"]


def gptq(
    w: jax.Array,
    format: Format,
    *,
    statistics: Statistics,
    damping: float = 0.01,
    activation_order: ActivationOrder | bool = "static",
) -> Rounded:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): inputs one by one, each one's error made up for
    by those that follow.

    The Hessian is the inputs' covariance with `damping` times its mean diagonal added. With
    `activation_order` the largest inputs come first (the authors' code: act_order). "static":
    blocks are of neighbouring inputs, and their scales are those of the weights as they were (its
    static_groups), so codes keep the inputs' order. "dynamic", or True: blocks are of inputs in the
    new order, which `order` remembers. False: inputs as they come, which is the authors' default
    and the worst of the three on a real model (benchmarks/results/quantization_smollm2_cpu.md). But
    for "static", a block's scale is found when its turn comes, from weights that have taken up
    earlier errors. Weights that are zero (pruned) stay zero.
    """
    if activation_order not in ("static", "dynamic", True, False):
        raise ValueError(
            f"activation_order must be 'static', 'dynamic' or false, got {activation_order!r}"
        )
    n_in, n_out = w.shape
    size = format.block_size or n_in
    order = (
        jnp.argsort(-jnp.diagonal(statistics["covariance"]), stable=True)
        if activation_order
        else None
    )
    w, hessian = damped(w, statistics["covariance"], damping)
    whole = jax.tree.map(lambda a: a[:, 0], format.fit(_blocks(w, format)))  # [groups, out]
    fixed = (
        jax.tree.map(lambda a: jnp.repeat(a, size, axis=0), whole)
        if activation_order == "static"
        else None
    )
    if order is not None:
        w, hessian = w[order], hessian[order][:, order]
        fixed = jax.tree.map(lambda a: a[order], fixed)
    upper, kept = inverse_factor(hessian), w != 0

    def block(w: jax.Array, start: jax.Array) -> Any:
        def part(a):
            return jax.lax.dynamic_slice_in_dim(a, start, size)

        rows, stay = part(w), part(kept)
        factor = jax.lax.dynamic_slice(upper, (start, start), (size, size))
        found = format.fit(rows)  # [1, out]
        scale, zero = found if fixed is None else jax.tree.map(part, fixed)

        def one(i: jax.Array, state: Any) -> Any:
            rows, codes, errors = state
            row = rows[i]
            own, offset = jax.tree.map(lambda a: a[i if len(a) > 1 else 0], (scale, zero))
            code = format.encode(jnp.where(stay[i], row, 0.0), own, offset)
            error = (row - format.decode(code, offset) * own) / factor[i, i]
            later = jnp.where(jnp.arange(size) > i, factor[i], 0.0)
            return rows - later[:, None] * error, codes.at[i].set(code), errors.at[i].set(error)

        codes = jnp.zeros((size, n_out), format.encode(rows, scale, zero).dtype)
        _, codes, errors = jax.lax.fori_loop(0, size, one, (rows, codes, jnp.zeros_like(rows)))
        beside = jax.lax.dynamic_slice_in_dim(upper, start, size)  # [size, in]
        beside = jnp.where(jnp.arange(n_in) >= start + size, beside, 0.0)
        return w - jnp.matmul(beside.T, errors), (codes, *jax.tree.map(lambda a: a[0], found))

    _, (codes, scale, zero) = jax.lax.scan(block, w, jnp.arange(0, n_in, size))
    codes = codes.reshape(n_in, n_out)
    if order is None or fixed is None:
        return Rounded(codes, scale, zero, order)
    return Rounded(codes[jnp.argsort(order)], *whole)


def awq(
    w: jax.Array, format: Format, *, statistics: Statistics, grid: int = 20, clip: bool = True
) -> Rounded:
    """AWQ (Lin et al. 2023, arXiv:2306.00978): inputs that are large on average are scaled up
    before rounding.

    The scale of an input is its mean magnitude to a power between 0 and 1, one of `grid` tried for
    the smallest error of the outputs on the calibration data; then, with `clip`, the largest
    weights of each block are cut off where that helps (at most by half). The inputs are divided by
    the scales when they come (`Quantized.smooth`).
    """
    covariance, size = statistics["covariance"], jnp.maximum(statistics["mean_abs"], 1e-4)

    def candidate(share: jax.Array) -> tuple[jax.Array, jax.Array]:
        scales = jnp.maximum(size**share, 1e-4)
        scales = scales / jnp.sqrt(scales.max() * scales.min())
        return scales, output_error(
            w, decode(nearest(w * scales[:, None], format), format) / scales[:, None], covariance
        )

    def best(state: Any, share: jax.Array) -> Any:
        scales, error = candidate(share)
        better = error < state[1]
        return (jnp.where(better, scales, state[0]), jnp.where(better, error, state[1])), None

    start = (jnp.ones_like(size), jnp.float32(jnp.inf))
    (scales, _), _ = jax.lax.scan(best, start, jnp.arange(grid) / grid)
    scaled = w * scales[:, None]
    rounded = (
        _clipped(scaled, format, covariance / (scales[:, None] * scales))
        if clip
        else nearest(scaled, format)
    )
    return rounded._replace(smooth=scales)


def _clipped(w: jax.Array, format: Format, covariance: jax.Array, steps: int = 10) -> Rounded:
    """Nearest rounding of `w` with each block's weights cut off where its own share of the outputs'
    error is smallest.
    """
    blocks = _blocks(w, format)
    groups, size, _ = blocks.shape
    # Each group's own part of the covariance: what it adds to an output, apart from the others.
    own = jnp.moveaxis(
        jnp.diagonal(covariance.reshape(groups, size, groups, size), axis1=0, axis2=2), -1, 0
    )
    largest = jnp.abs(blocks).max(-2, keepdims=True)

    def best(state: Any, share: jax.Array) -> Any:
        limit = largest * share
        cut = jnp.clip(blocks, -limit, limit)
        scale, zero = format.fit(cut)
        error = blocks - format.round_trip(cut, scale, zero)
        loss = jnp.einsum("gio,gij,gjo->go", error, own, error, precision="highest")[:, None]
        better = loss < state[1]
        return (jnp.where(better, limit, state[0]), jnp.where(better, loss, state[1])), None

    shares = 1.0 - jnp.arange(steps) / (2.0 * steps)
    (limit, _), _ = jax.lax.scan(best, (largest, jnp.full(largest.shape, jnp.inf)), shares)
    cut = jnp.clip(blocks, -limit, limit)
    return _encode(cut.reshape(w.shape), format, *format.fit(cut))


def smoothquant(
    w: jax.Array, format: Format, *, statistics: Statistics, strength: float = 0.5
) -> Rounded:
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, equation 4): outliers of the inputs moved
    into the weights.

    An input is divided by max|x|^strength / max|w|^(1 - strength), so that activations can be
    quantized too.
    """
    size = jnp.maximum(statistics["max_abs"], 1e-5)
    weight = jnp.maximum(jnp.abs(w).max(1), 1e-5)
    scales = jnp.maximum(size**strength / weight ** (1 - strength), 1e-5)
    return nearest(w * scales[:, None], format)._replace(smooth=scales)


def hqq(
    w: jax.Array,
    format: Format,
    *,
    steps: int = 20,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
) -> Rounded:
    """HQQ (Badri and Shaji 2023): zero points that minimise the l_p norm of the error (p = `power`
    < 1), without data.

    Half-quadratic splitting: the error is shrunk, then the zero point that explains the rest best
    is taken. For integers with zero points, which become fractions.
    """
    if not isinstance(format, Int) or format.symmetric:
        raise ValueError("HQQ moves zero points: it needs an integer format with symmetric=False")
    blocks = _blocks(w, format)
    scale, zero = format.fit(blocks)
    zero = -jnp.minimum(blocks.min(-2, keepdims=True), 0) / scale

    def error_of(zero: jax.Array) -> jax.Array:
        return jnp.abs(blocks - format.round_trip(blocks, scale, zero)).mean()

    def step(state: Any, i: jax.Array) -> Any:
        zero, best, least = state
        codes = format.encode(blocks, scale, zero)
        strength = beta * growth**i
        error = blocks - format.decode(codes, zero) * scale
        shrunk = jnp.sign(error) * jnp.maximum(
            jnp.abs(error) - jnp.maximum(jnp.abs(error), 1e-8) ** (power - 1) / strength, 0
        )
        zero = (codes - (blocks - shrunk) / scale).mean(-2, keepdims=True)
        now = error_of(zero)
        return (zero, jnp.where(now < least, zero, best), jnp.minimum(now, least)), None

    (_, zero, _), _ = jax.lax.scan(step, (zero, zero, error_of(zero)), jnp.arange(steps))
    return _encode(w, format, scale, zero)


ROUNDINGS: dict[str, Callable[..., Rounded]] = {
    "nearest": nearest,
    "stochastic": stochastic,
    "gptq": gptq,
    "awq": awq,
    "smoothquant": smoothquant,
    "hqq": hqq,
}
NEEDS: dict[str, tuple[Statistic, ...]] = {
    "gptq": ("covariance",), "awq": ("covariance", "mean_abs"), "smoothquant": ("max_abs",),
}  # fmt: skip

FRACTIONAL = ("hqq",)  # their zero points lie between codes
WITHOUT_DATA = {
    "gptq": "nearest",
    "awq": "nearest",
    "smoothquant": "nearest",
}  # what is done where there are no statistics


def needed_statistics(rounding: str, format: Format) -> tuple[Statistic, ...]:
    """What a rounding, and static activations, need to know of a weight's inputs."""
    static = getattr(format, "activations", None) == "static"
    return tuple(dict.fromkeys((*NEEDS.get(rounding, ()), *(("max_abs",) if static else ()))))


def plain_rounding(name: str, w: jax.Array, format: Format, like: Rounded) -> Rounded:
    """`w` [in, out] as the rounding is done without statistics, with the fields that `like` has."""
    found = ROUNDINGS[WITHOUT_DATA[name]](w, format)
    if like.order is not None:
        found = found._replace(order=jnp.arange(len(w), dtype=like.order.dtype))
    return found if like.smooth is None else found._replace(smooth=jnp.ones_like(like.smooth))


def check_rounding(name: str, options: Iterable[str]) -> None:
    """Raise ValueError for an unknown rounding, or an option that it does not have."""
    if name not in ROUNDINGS:
        raise ValueError(f"unknown rounding {name!r}; roundings: {', '.join(ROUNDINGS)}")
    known = [
        p
        for p in inspect.signature(ROUNDINGS[name]).parameters
        if p not in ("w", "format", "key", "statistics")
    ]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"rounding {name!r} has no option {unknown[0]!r}; its options: "
            f"{', '.join(known) or 'none'}"
        )


def output_error(w: jax.Array, back: jax.Array, covariance: jax.Array) -> jax.Array:
    """Mean over tokens of ||x (w - back)||^2, from the inputs' covariance."""
    error = w - back
    return jnp.sum(jnp.matmul(covariance, error, precision="highest") * error)


def _blocks(w: jax.Array, format: Format) -> jax.Array:
    """w [in, out] as [groups, block, out]."""
    n_in, n_out = w.shape
    return w.reshape(-1, format.block_size or n_in, n_out)


def _encode(
    w: jax.Array,
    format: Format,
    scale: jax.Array,
    zero: jax.Array | None,
    noise: jax.Array | None = None,
) -> Rounded:
    blocks = _blocks(w, format)
    codes = format.encode(
        blocks, scale, zero, None if noise is None else noise.reshape(blocks.shape)
    )
    return Rounded(codes.reshape(w.shape), scale[:, 0], None if zero is None else zero[:, 0])


def decode(rounded: Rounded, format: Format) -> jax.Array:
    """The matrix [in, out] behind codes, in their order and with `smooth` left in."""
    blocks = _blocks(rounded.codes, format)
    zero = None if rounded.zero is None else rounded.zero[:, None]
    return (format.decode(blocks, zero) * rounded.scale[:, None]).reshape(rounded.codes.shape)
