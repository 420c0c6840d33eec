"""Adam with moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), as an optax transformation.

Both moments are kept in blocks of 256 over the dynamic map, signed for the first and unsigned for
the second: 2 bytes a trained parameter and 1/32 more, instead of 8. Arrays of fewer than 4,096
numbers keep float32, as in bitsandbytes. Each of the layers stacked in an array is an array of its
own here: its size counts, and no block goes on in the next layer. A second moment that is not zero
is never kept as zero, by which the next step would be divided (the zero-point problem, Li et al.
2023, arXiv:2309.01507).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.select import layer_axes
from peft_jax.quantization.dynamic_map import BLOCK, dequantize_blocks, quantize_blocks

SMALL = 4096


class Adam8bitState(NamedTuple):
    """Step count; each moment's codes, a tree like the parameters (uint8, or float32 where small),
    and scales by leaf.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] - as optax calls it
    mu: Any
    nu: Any
    mu_scales: tuple[jax.Array, ...]
    nu_scales: tuple[jax.Array, ...]


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """optax's `scale_by_adam` with both moments in 8 bits between steps; a step itself is in
    float32.
    """

    def init(params: Any) -> Adam8bitState:
        leaves, structure = jax.tree.flatten(params)
        layers = jax.tree.leaves(layer_axes(params))
        mu, nu = (
            [_empty(p, n) for p, n in zip(leaves, layers, strict=True)] for _ in range(2)
        )  # arrays of their own, so that each can be donated
        trees = [structure.unflatten([codes for codes, _ in m]) for m in (mu, nu)]
        return Adam8bitState(
            jnp.zeros((), jnp.int32), *trees, *(tuple(scale for _, scale in m) for m in (mu, nu))
        )

    def update(updates: Any, state: Adam8bitState, params: Any = None) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        count = cast("jax.Array", optax.safe_increment(state.count))
        correct1, correct2 = 1 - b1**count, 1 - b2**count
        out, mu, nu = [], [], []
        moments = zip(
            leaves,
            jax.tree.leaves(layer_axes(updates)),
            jax.tree.leaves(state.mu),
            state.mu_scales,
            jax.tree.leaves(state.nu),
            state.nu_scales,
            strict=True,
        )
        for g, n, m, m_scale, v, v_scale in moments:
            g32 = g.astype(jnp.float32)
            m = b1 * _load(m, m_scale, n, signed=True) + (1 - b1) * g32
            v = b2 * _load(v, v_scale, n, signed=False) + (1 - b2) * jnp.square(g32)
            out.append(((m / correct1) / (jnp.sqrt(v / correct2) + eps)).astype(g.dtype))
            mu.append(_store(m, n, signed=True))
            nu.append(_store(v, n, signed=False))
        (m_codes, m_scales), (v_codes, v_scales) = (
            zip(*x, strict=True) if x else ((), ()) for x in (mu, nu)
        )
        new = Adam8bitState(
            count,
            structure.unflatten(m_codes),
            structure.unflatten(v_codes),
            tuple(m_scales),
            tuple(v_scales),
        )
        return structure.unflatten(out), new

    return optax.GradientTransformation(init, cast("optax.TransformUpdateFn", update))


def adamw8bit(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """optax's `adamw` with moments in 8 bits."""
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _by_layer(x: jax.Array, layers: int) -> jax.Array:
    """[L, n]: the numbers of each layer, given how many leading axes count layers; L is 1 where
    none does.
    """
    return x.reshape(math.prod(x.shape[:layers]), -1)


def _is_small(x: jax.Array, layers: int) -> bool:
    return math.prod(x.shape[layers:]) < SMALL


def _empty(p: jax.Array, layers: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of zeros: a scale of 0 makes every code zero."""
    if _is_small(p, layers):
        return jnp.zeros(p.shape, jnp.float32), jnp.zeros((1,), jnp.float32)
    blocks = math.prod(p.shape[:layers]) * math.ceil(math.prod(p.shape[layers:]) / BLOCK)
    return jnp.zeros(p.shape, jnp.uint8), jnp.zeros((blocks,), jnp.float32)


def _load(codes: jax.Array, scale: jax.Array, layers: int, *, signed: bool) -> jax.Array:
    if codes.dtype != jnp.uint8:
        return codes
    rows = _by_layer(codes, layers)
    of_layer = functools.partial(dequantize_blocks, signed=signed)
    return jax.vmap(of_layer)(rows, scale.reshape(len(rows), -1)).reshape(codes.shape)


def _store(x: jax.Array, layers: int, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    if _is_small(x, layers):
        return x, jnp.zeros((1,), jnp.float32)
    rows = _by_layer(x, layers)
    codes, scale = jax.vmap(functools.partial(quantize_blocks, signed=signed))(rows)
    if (
        not signed
    ):  # a root of zero under a first moment that is not: the next step would be of any size
        codes = jnp.where((codes == 0) & (rows > 0), jnp.uint8(1), codes)
    return codes.reshape(x.shape), scale.reshape(-1)
