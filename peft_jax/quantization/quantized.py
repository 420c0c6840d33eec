"""The quantized weight: packed codes and scales in a matrix's place, decoded when it is multiplied
with.

The product's backward pass needs the gradient of the input alone and decodes the weight again, so
that no full-precision copy outlives one product: in a model of many layers one decoded weight
exists at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.packing import pack, unpack
from peft_jax.core.reparametrised import Matrix, node
from peft_jax.core.weight import Axes, from_matrix, row_groups, static
from peft_jax.quantization.dynamic_map import DoubleScale
from peft_jax.quantization.formats import Format


@node
class Quantized(Matrix):
    """A matrix [*lead, in, out] in a `format`: value = scale * decode(code, zero).

    codes: uint8 [*lead, in * bits / 8, out], or [*lead, in, out] of the storage dtype at 8 bits;
    scale [*lead, groups, out] ([*lead, 1, 1] for one scale a matrix), possibly a `DoubleScale`;
    zero [*lead, groups, out]. `order` [*lead, in] says which input each row of codes belongs to
    (GPTQ's activation order). Inputs are divided by `smooth` [*lead, in] (AWQ, SmoothQuant), which
    the codes make up for. `input_scale` [*lead] is the static scale of quantized activations, or 0
    where none is known: there each token has its own.
    """

    sharded_together: ClassVar[bool] = True  # else a block could straddle devices
    codes: jax.Array
    scale: Any
    zero: jax.Array | None = None
    order: jax.Array | None = None
    smooth: jax.Array | None = None
    input_scale: jax.Array | None = None
    format: Format = static()
    logical_dtype: Any = static()
    frozen: bool = static(default=True)

    def __post_init__(self) -> None:
        shape = getattr(self.codes, "shape", None)
        rows, out = self.code_rows, math.prod(self.out_sizes)
        if shape is not None and len(shape) >= 2 and tuple(shape[-2:]) != (rows, out):
            raise ValueError(
                f"codes of {self.in_sizes} x {self.out_sizes} weights in {self.format.bits} bits "
                "have shape "
                f"[..., {rows}, {out}], not {tuple(shape)}"
            )

    @property
    def code_rows(self) -> int:
        """Rows of `codes`."""
        return math.prod(self.in_sizes) * (self.format.bits if self.format.bits < 8 else 8) // 8

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    @property
    def dtype(self) -> Any:
        return self.logical_dtype

    def field_specs(self, spec: P) -> dict[str, P]:
        lead, into, out = (
            tuple(spec)[: len(self.lead)],
            spec[self.in_axes[0]],
            spec[self.out_axes[0]],
        )
        groups, outs = (
            (into if self.scale.shape[-2] > 1 else None),
            (out if self.scale.shape[-1] > 1 else None),
        )
        if (
            self.order is not None
        ):  # inputs lie in another order than the weight's: one device could not find its own
            into = groups = None
        scale = P(*lead, groups, outs)
        specs = {
            "codes": P(*lead, into, out),
            "scale": scale,
            "zero": scale,
            "input_scale": P(*lead),
        }
        return {**specs, "order": P(*lead, None), "smooth": P(*lead, into)}

    def decoded(self, dtype: Any = jnp.float32) -> jax.Array:
        """The codes' values [*lead, in, out], in the order of the codes and before `smooth` is made
        up for.
        """
        codes = self.codes if self.format.bits == 8 else unpack(self.codes, self.format.bits)
        scale = self.format.load_scale(self.scale)
        groups, lead, (n_in, n_out) = scale.shape[-2], codes.shape[:-2], codes.shape[-2:]
        blocks = codes.reshape(*lead, groups, n_in // groups, n_out)
        zero = None if self.zero is None else self.zero.astype(jnp.float32)[..., :, None, :]
        values: Any = self.format.decode(blocks, zero) * scale[..., :, None, :]
        return values.reshape(codes.shape).astype(dtype)

    def matrix(self) -> jax.Array:
        """The matrix [*lead, in, out] that this weight stands for, float32."""
        w = self.decoded()
        if self.order is not None:
            w = jnp.take_along_axis(w, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)
        return w if self.smooth is None else w / self.smooth[..., None]

    def materialize(self) -> jax.Array:
        return self.unrounded().astype(self.dtype)

    def unrounded(self) -> jax.Array:
        return from_matrix(self.matrix(), self.shape, self.in_axes, self.out_axes)

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        transposed = (in_axes, out_axes) == (self.out_axes, self.in_axes)
        if not transposed and (in_axes, out_axes) != (self.in_axes, self.out_axes):
            return super().matmul(x, in_axes=in_axes, out_axes=out_axes, precision=precision)
        tokens = x.shape[: x.ndim - len(in_axes)]
        y: Any = _product(transposed, precision, x.reshape(*tokens, -1), self)
        return y.reshape(*tokens, *(self.in_sizes if transposed else self.out_sizes))

    def ragged_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        y = super().ragged_matmul(x, sizes)
        return (
            straight_through(y, _ragged_low_precision(x, self, sizes))
            if rounds_inputs(self.format)
            else y
        )

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        if (self.in_axes, self.out_axes) != ((-1,), (-2,)):
            return super().take(ids, dtype)
        flat = ids.reshape(-1)

        def columns(a):
            return None if a is None else a[..., flat] if a.shape[-1] > 1 else a

        picked = self.replace(
            codes=self.codes[..., flat],
            scale=columns(_single(self.scale)),
            zero=columns(self.zero),
            out_sizes=(flat.size,),
        )
        rows: Any = picked.matrix().mT.reshape(*ids.shape, self.in_sizes[0])
        rows = jnp.where(
            (ids < self.out_sizes[0])[..., None], rows, jnp.nan
        )  # as `jnp.take` has it; indexing would clamp
        return rows.astype(dtype or self.dtype)

    def merge(self) -> Quantized:
        """Itself: there is nothing to fold in."""
        return self

    def unmerge(self, merged: Any) -> Quantized:
        return self


def _single(scale: Any) -> jax.Array:
    """Scales that can be cut into parts: doubled ones, whose own blocks run across outputs, as
    floats.
    """
    return scale.materialize() if isinstance(scale, DoubleScale) else scale


def _straight(x: jax.Array, w: Quantized, precision: Any) -> jax.Array:
    """x [..., in] times the matrix -> [..., out]."""
    if w.smooth is not None:
        x = (x / w.smooth).astype(x.dtype)
    if w.order is not None:
        x = jnp.take(x, w.order, axis=-1)
    if rounds_inputs(w.format):
        return _low_precision(x, w)
    if (tiles := _tiles(w)) == 1:
        return jnp.matmul(x, w.decoded(x.dtype), precision=precision)
    y = jax.lax.map(
        lambda tile: jnp.matmul(x, tile.decoded(x.dtype), precision=precision), _tiled(w, tiles)
    )
    return jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], -1)


def _back(y: jax.Array, w: Quantized, precision: Any) -> jax.Array:
    """y [..., out] times the transposed matrix -> [..., in]."""
    if (tiles := _tiles(w)) == 1:
        x = jnp.matmul(y, w.decoded(y.dtype).mT, precision=precision)
    else:
        x = _back_tiled(y, w, tiles, precision)
    if w.order is not None:
        x = jnp.take(x, jnp.argsort(w.order), axis=-1)
    return x if w.smooth is None else (x / w.smooth).astype(y.dtype)


_TILE = 2**23  # weights that are decoded at a time


def _tiles(w: Quantized) -> int:
    """In how many parts of its outputs a large matrix is decoded; on a mesh, where each device has
    a part already, in one.
    """
    n_in, n_out = math.prod(w.in_sizes), math.prod(w.out_sizes)
    if n_in * n_out <= 2 * _TILE or not jax.sharding.get_abstract_mesh().empty:
        return 1
    return next(n for n in range(n_in * n_out // _TILE, n_out + 1) if n_out % n == 0)


def _tiled(w: Quantized, tiles: int) -> Quantized:
    """A matrix as a stack of `tiles` parts of its outputs."""
    size = math.prod(w.out_sizes) // tiles

    def split(a: Any) -> Any:
        if a is None:
            return None
        parts = (
            a.reshape(a.shape[0], tiles, size)
            if a.shape[-1] > 1
            else jnp.broadcast_to(a[:, None], (1, tiles, 1))
        )
        return jnp.moveaxis(parts, 1, 0)

    scale = _single(w.scale)
    return w.replace(
        codes=split(w.codes),
        scale=split(scale),
        zero=split(w.zero),
        order=None,
        smooth=None,
        input_scale=None,
        out_sizes=(size,),
    )


def _back_tiled(y: jax.Array, w: Quantized, tiles: int, precision: Any) -> jax.Array:
    parts = jnp.moveaxis(y.reshape(*y.shape[:-1], tiles, -1), -2, 0)

    def add(total: jax.Array, part: Any) -> Any:
        one, tile = part
        product = jnp.matmul(
            one, tile.decoded(y.dtype).mT, precision=precision, preferred_element_type=jnp.float32
        )
        return total + product, None

    start = jnp.zeros((*y.shape[:-1], math.prod(w.in_sizes)), jnp.float32)
    return jax.lax.scan(add, start, (parts, _tiled(w, tiles)))[0].astype(y.dtype)


def _low_precision(x: jax.Array, w: Quantized) -> jax.Array:
    """The product of quantized inputs and weights, in the backend's own 8-bit product where it has
    one.
    """
    q, size = encode_inputs(x, w.format, w.input_scale)
    total = jnp.int32 if jnp.issubdtype(q.dtype, jnp.integer) else jnp.float32
    y = jax.lax.dot_general(
        q, w.codes, (((q.ndim - 1,), (0,)), ((), ())), preferred_element_type=total
    )
    return (y.astype(jnp.float32) * size * w.scale[0]).astype(x.dtype)


def _ragged_low_precision(x: jax.Array, w: Quantized, sizes: jax.Array) -> jax.Array:
    """The product of quantized inputs [N, in], in groups, and the weights of each group's expert.

    Codes are multiplied in x's dtype, which holds every one of them exactly.
    """
    group = jnp.minimum(row_groups(len(x), sizes), len(sizes) - 1)
    if w.smooth is not None:
        x = (x / w.smooth[group]).astype(x.dtype)
    if w.order is not None:
        x = jnp.take_along_axis(x, w.order[group], axis=-1)
    q, size = encode_inputs(x, w.format, of_rows(w.input_scale, group))
    codes, sizes = w.codes.astype(x.dtype), sizes.astype(jnp.int32)
    y = jax.lax.ragged_dot(q.astype(x.dtype), codes, sizes, preferred_element_type=jnp.float32)
    return (y * size * w.scale[group, 0]).astype(x.dtype)


def rounds_inputs(format: Format) -> bool:
    """Whether a format quantizes the inputs of its weights too."""
    return getattr(format, "activations", None) is not None


def of_rows(scale: jax.Array | None, group: jax.Array) -> jax.Array | None:
    """Static scales [E] as those of rows [N, 1] that belong to the experts `group` [N]."""
    return None if scale is None else scale[group][:, None]


def encode_inputs(
    x: jax.Array, format: Any, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(codes [..., in] of the inputs x, their scales [..., 1]): `scale` where it is positive, else
    one for each token.
    """
    x = x.astype(jnp.float32)
    size = jnp.abs(x).max(-1, keepdims=True) / format.largest
    if scale is not None:
        size = jnp.where(scale > 0, scale, size)
    return format.encode(x, jnp.where(size == 0, 1.0, size), None), size


def round_inputs(x: jax.Array, format: Format, scale: jax.Array | None) -> jax.Array:
    """The inputs x [..., in] as their codes stand for them (`encode_inputs`)."""
    codes, size = encode_inputs(x, format, scale)
    return (format.decode(codes, None) * size).astype(x.dtype)


@jax.custom_jvp
def straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of `x` (Bengio et al. 2013, arXiv:1308.3432)."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(transposed: bool, precision: Any, x: jax.Array, w: Quantized) -> jax.Array:
    return (_back if transposed else _straight)(x, w, precision)


def _product_forward(transposed: bool, precision: Any, x: jax.Array, w: Quantized) -> Any:
    return _product(transposed, precision, x, w), w


def _product_backward(transposed: bool, precision: Any, w: Quantized, grad: jax.Array) -> Any:
    straight = w.replace(
        format=weight_only(w.format)
    )  # gradients pass quantized activations straight through
    return (_straight if transposed else _back)(grad, straight, precision), None


_product.defvjp(_product_forward, _product_backward)


def weight_only(format: Format) -> Format:
    """The format that stores the same codes and leaves the inputs as they are."""
    return dataclasses.replace(format, activations=None) if rounds_inputs(format) else format  # type: ignore[call-arg]


def packed(codes: jax.Array, format: Format) -> jax.Array:
    """Codes [*lead, in, out] as `Quantized` keeps them."""
    return codes if format.bits == 8 else pack(codes, format.bits)
