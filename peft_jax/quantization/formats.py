"""Storage formats: which numbers a code can stand for, and how a block of weights gets its scale.

A weight is a matrix [*lead, in, out]; `block_size` consecutive inputs of one output share a scale
(None: all inputs do). So blocks never straddle outputs, and agree with those of Hugging Face's
[out, in] weights flattened. A value is `scale * decode(code, zero)`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.quantization.dynamic_map import DoubleScale, double_quantize

Activations = Literal["dynamic", "static"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What the formats have in common. `bits` a code; `block_size` inputs share a scale, None: all
    inputs of an output.
    """

    kind: ClassVar[str]
    bits: int
    block_size: int | None = None

    @property
    def name(self) -> str:
        """What `make_format` takes: "nf4", "int4" and the like."""
        return self.kind

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(scale, zero point or None), each [..., 1, out], of blocks w [..., block, out],
        float32.
        """
        raise NotImplementedError

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        """Codes of `w`; the others broadcast to its shape. `noise` in [0, 1) rounds stochastically,
        None to the nearest.
        """
        raise NotImplementedError

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        """What codes stand for in units of the scale, float32."""
        raise NotImplementedError

    def store_scale(self, scale: jax.Array) -> Any:
        """Scales [*lead, groups, out] as they are kept."""
        return scale

    def load_scale(self, stored: Any) -> jax.Array:
        """The scales [*lead, groups, out] behind what `store_scale` kept, float32."""
        return stored.astype(jnp.float32)

    def round_trip(self, w: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """`w` as it comes back: rounded and decoded."""
        return self.decode(self.encode(w, scale, zero), zero) * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(Format):
    """Integers of 8, 4, 3 or 2 bits: symmetric, w = scale * q with q in [-2^(b-1), 2^(b-1) - 1] and
    scale = max|w| / ((2^b - 1) / 2), or with zero points, w = scale * (q - zero) with q and zero in
    [0, 2^b - 1].

    With `activations` (8 bits, symmetric, one scale an output) inputs are quantized to 8 bits too
    and the product is one of integers: "dynamic" takes a scale for each token, "static" one for the
    weight, from calibration.
    """

    kind: ClassVar[str] = "int"
    bits: int = 8
    symmetric: bool = True
    activations: Activations | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(
                f"integers of {self.bits} bits are not supported; bits must be 8, 4, 3 or 2"
            )
        if self.activations and not (self.bits == 8 and self.symmetric and self.block_size is None):
            raise ValueError(
                "activations are quantized beside symmetric 8-bit weights with one scale an "
                "output only"
            )

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def largest(self) -> float:
        """What the largest magnitude is mapped to."""
        return self.levels / 2

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if self.symmetric:
            scale = jnp.abs(w).max(-2, keepdims=True) / self.largest
            return _nonzero(scale), None
        low, high = (
            jnp.minimum(w.min(-2, keepdims=True), 0),
            jnp.maximum(w.max(-2, keepdims=True), 0),
        )
        scale = _nonzero((high - low) / self.levels)
        return scale, jnp.round(-low / scale)

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        whole = (
            jnp.round(zero) if zero is not None else 0 if self.bits == 8 else self.levels // 2 + 1
        )
        q = w / scale if zero is None else w / scale + (zero - whole)
        if zero is None and noise is None:
            # A block's largest negative weight lies just between two codes, where rounding errors
            # would decide.
            q = jnp.where(q < -self.largest * (1 - 1e-6), q - 0.25, q)
        q = whole + (jnp.round(q) if noise is None else jnp.floor(q + noise))
        if zero is None and self.bits == 8:
            return jnp.clip(q, -128, 127).astype(jnp.int8)
        return jnp.clip(q, 0, self.levels).astype(jnp.uint8)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        q = codes.astype(jnp.float32)
        if zero is None:
            return q if codes.dtype == jnp.int8 else q - (self.levels // 2 + 1)
        return q - zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Table(Format):
    """4-bit codes into a table of 16 values, scaled by the block's largest magnitude."""

    bits: int = 4
    block_size: int | None = 64
    double: bool = False
    table: ClassVar[np.ndarray]  # code -> value
    order: ClassVar[np.ndarray]  # codes in ascending order of their values

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"{type(self).__name__} has 4 bits, not {self.bits}")

    @classmethod
    def bounds(cls) -> np.ndarray:
        """Where the nearest value changes, 15 of them."""
        values = cls.table[cls.order]
        return (values[:-1] + values[1:]) / np.float32(2)

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return _absmax(w), None

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        x = _over_absmax(w, scale)
        if noise is not None:
            return _stochastic(x, self.table, self.order, noise)
        place = functools.reduce(jnp.add, [(x > b).astype(jnp.uint8) for b in self.bounds()])
        return (
            place
            if (self.order == np.arange(16)).all()
            else jnp.take(jnp.asarray(self.order, jnp.uint8), place)
        )

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        return _look_up(self.table, codes)

    def store_scale(self, scale: jax.Array) -> Any:
        return double_quantize(scale) if self.double else scale

    def load_scale(self, stored: Any) -> jax.Array:
        return (
            stored.materialize() if isinstance(stored, DoubleScale) else stored.astype(jnp.float32)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(_Table):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of a normal
    distribution.

    `double` quantizes the blocks' scales in turn: 4.127 bits a weight with blocks of 64 instead of
    4.5.
    """

    kind: ClassVar[str] = "nf4"
    double: bool = True
    table: ClassVar[np.ndarray] = np.array(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        np.float32,
    )
    order: ClassVar[np.ndarray] = np.arange(16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP4(_Table):
    """The 4-bit float of bitsandbytes: sign, two bits of exponent, one of mantissa, over 12."""

    kind: ClassVar[str] = "fp4"
    table: ClassVar[np.ndarray] = (
        np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32)
        / np.float32(12)
    ).astype(np.float32)
    order: ClassVar[np.ndarray] = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(Format):
    """8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433): e4m3 (up to 448) or e5m2 (up to
    57,344).

    One scale for each output or, `per="tensor"`, one for the matrix. `activations` as for `Int`.
    """

    kind: ClassVar[str] = "fp8"
    bits: int = 8
    type: Literal["e4m3", "e5m2"] = "e4m3"
    per: Literal["channel", "tensor"] = "channel"
    activations: Activations | None = None

    def __post_init__(self) -> None:
        if (
            self.bits != 8
            or self.type not in ("e4m3", "e5m2")
            or self.per not in ("channel", "tensor")
        ):
            raise ValueError(
                f"FP8 is e4m3 or e5m2 per channel or tensor, not {self.type!r} per {self.per!r} of "
                f"{self.bits} bits"
            )
        if self.block_size is not None:
            raise ValueError("FP8 has a scale per channel or tensor and takes no block_size")

    @property
    def storage(self) -> Any:
        return jnp.float8_e4m3fn if self.type == "e4m3" else jnp.float8_e5m2

    @property
    def largest(self) -> float:
        return float(jnp.finfo(self.storage).max)

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        axes = (-2,) if self.per == "channel" else (-2, -1)
        return _nonzero(jnp.abs(w).max(axes, keepdims=True) / self.largest), None

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        x = jnp.clip(w / scale, -self.largest, self.largest)
        if noise is not None:
            values = _finite_values(self.storage)
            lower, upper, share = _neighbours(x, values)
            x = jnp.where(noise < share, upper, lower)
        return x.astype(self.storage)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP4(Format):
    """OCP Microscaling MXFP4 (Rouhani et al. 2023, arXiv:2310.10537): e2m1 elements, a shared power
    of two for each 32.
    """

    kind: ClassVar[str] = "mxfp4"
    bits: int = 4
    block_size: int | None = 32
    table: ClassVar[np.ndarray] = np.array(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
    )

    def __post_init__(self) -> None:
        if self.bits != 4 or self.block_size != 32:
            raise ValueError(
                f"MXFP4 has blocks of 32 and 4 bits, not {self.block_size} and {self.bits}"
            )

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        exponent = _exponent(_absmax(w)) - 2  # 6 = 1.5 * 2^2 is the largest element
        return _power(jnp.maximum(exponent, 0)), None

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        small = scale < _SMALL
        x = jnp.where(small, _amplified(w), w) / jnp.where(small, scale * _AMPLIFY, scale)
        sign = jnp.where(jnp.signbit(x), jnp.uint8(8), jnp.uint8(0))
        size, values = jnp.abs(x), self.table[:8]
        if noise is not None:
            return sign | _stochastic(jnp.minimum(size, values[-1]), values, np.arange(8), noise)
        bounds = (values[:-1] + values[1:]) / np.float32(2)  # ties go to the even code
        steps = [
            ((size > b) if i % 2 == 0 else (size >= b)).astype(jnp.uint8)
            for i, b in enumerate(bounds)
        ]
        return sign | functools.reduce(jnp.add, steps)

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        return _look_up(self.table, codes)

    def store_scale(self, scale: jax.Array) -> jax.Array:
        return _exponent(scale).astype(jnp.uint8)

    def load_scale(self, stored: jax.Array) -> jax.Array:
        return _power(stored.astype(jnp.int32))


FORMATS: dict[str, type[Format]] = {f.kind: f for f in (Int, NF4, FP4, FP8, MXFP4)}


def make_format(spec: Format | str, **options: Any) -> Format:
    """A format from its name ("nf4", "fp4", "fp8", "mxfp4", "int8", "int4", "int3", "int2") and
    options.

    Raises ValueError for an unknown name or option.
    """
    if isinstance(spec, Format):
        return dataclasses.replace(spec, **options) if options else spec
    name, bits = (
        (spec[:3], {"bits": int(spec[3:])})
        if spec.startswith("int") and spec[3:].isdigit()
        else (spec, {})
    )
    if name not in FORMATS:
        raise ValueError(
            f"unknown format {spec!r}; formats: nf4, fp4, fp8, mxfp4, int8, int4, int3, int2"
        )
    known = [f.name for f in dataclasses.fields(FORMATS[name]) if f.name != "bits"]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"format {spec!r} has no option {unknown[0]!r}; its options: {', '.join(known)}"
        )
    return FORMATS[name](**bits, **options)


def _look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """table[codes] for codes below 16."""
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


# ----------------------------------------------------------------------------------------------
# exact arithmetic XLA flushes subnormal numbers to zero on CPUs and TPUs; what follows keeps blocks
# of them exact, through their bits.

_AMPLIFY = np.float32(2.0**64)
_SMALL = np.float32(2.0**-60)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1.0, scale)


def _absmax(w: jax.Array) -> jax.Array:
    """max |w| over the block axis, exact for subnormal numbers too: magnitudes are ordered as their
    bits are.
    """
    bits = jax.lax.bitcast_convert_type(w.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    return jax.lax.bitcast_convert_type(bits.max(-2, keepdims=True), jnp.float32)


def _amplified(x: jax.Array) -> jax.Array:
    """x * 2^64, exact for subnormal x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    small = (bits & 0x7FFFFF).astype(jnp.float32) * np.float32(2.0**-85)
    return jnp.where((bits & 0x7F800000) == 0, jnp.where(bits < 0, -small, small), x * _AMPLIFY)


def _over_absmax(w: jax.Array, absmax: jax.Array) -> jax.Array:
    """w / absmax in [-1, 1] as bitsandbytes computes it: times the reciprocal of at least 1e-38."""
    small = absmax < _SMALL
    least = jnp.where(small, np.float32(1e-38) * _AMPLIFY, _SMALL)
    size = jnp.maximum(jnp.where(small, _amplified(absmax), absmax), least)
    return jnp.clip(jnp.where(small, _amplified(w), w) * (1.0 / size), -1, 1)


def _exponent(x: jax.Array) -> jax.Array:
    """The biased exponent of positive float32 numbers."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF


def _power(exponent: jax.Array) -> jax.Array:
    """2^(exponent - 127), at least the smallest normal number."""
    return jax.lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)


# ----------------------------------------------------------------------------------------------
# stochastic rounding


def _neighbours(x: jax.Array, values: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the value below x, the one above, how far x is on the way) among ascending `values`."""
    place = _below(x, values)
    table = jnp.asarray(values, jnp.float32)
    lower, upper = jnp.take(table, place), jnp.take(table, place + 1)
    return lower, upper, (x - lower) / (upper - lower)


def _below(x: jax.Array, values: np.ndarray) -> jax.Array:
    return jnp.clip(
        jnp.searchsorted(jnp.asarray(values, jnp.float32), x, side="right") - 1, 0, len(values) - 2
    )


def _stochastic(x: jax.Array, table: np.ndarray, order: np.ndarray, noise: jax.Array) -> jax.Array:
    """Codes of the neighbours of x, the upper one with the probability that makes the mean x."""
    values, first = np.unique(table[order], return_index=True)  # of two zeros one will do
    _, _, share = _neighbours(x, values)
    codes = jnp.asarray(order[first], jnp.uint8)
    return jnp.take(codes, _below(x, values) + (noise < share))


@functools.cache
def _finite_values(dtype: Any) -> np.ndarray:
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])
