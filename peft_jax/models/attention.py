"""Attention through one function that picks the best implementation for the backend.

`attention` runs cuDNN's flash kernel on GPUs, the splash kernel on TPUs, and a grouped einsum with a float32
softmax elsewhere or where a kernel does not apply (a soft cap on the GPU, single tokens, odd shapes).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from peft_jax.models.splash import splash_attention, splash_supports

_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


@struct.dataclass
class Mask:
    """Who may look at whom, prepared once per forward pass and shared by all layers.

    `full` and `local` are boolean [B or 1, 1, T, S] (True: visible), for layers without and with a sliding window.
    `segment_ids` is [B, T], None without padding or packing. `aligned` says that queries and
    keys are the same tokens in order, which the kernels of GPUs and TPUs ask for. With `dense` it is the boolean arrays
    alone that say it. `prefix` keys stand before the aligned ones (see `with_prefix`); `bias` [B or 1, 1, T, prefix] is
    added to their scores. `positions` are those of the queries [B or 1, T], `width` the window of the local layers.
    Where it is not `causal`, tokens see those behind them too.
    """

    full: jax.Array
    local: jax.Array
    segment_ids: jax.Array | None
    window: int | None = struct.field(pytree_node=False)
    aligned: bool = struct.field(pytree_node=False)
    positions: jax.Array
    width: int | None = struct.field(pytree_node=False)
    dense: bool = struct.field(pytree_node=False, default=False)
    prefix: int = struct.field(pytree_node=False, default=0)
    bias: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=True)

    def with_prefix(self, length: int, visible: Any = True, bias: jax.Array | None = None, first: int = 0) -> Mask:
        """The mask with `length` keys in front, at the positions first, first + 1, ..., which every segment sees.

        `visible` (a boolean that broadcasts to [B, 1, T, length]) hides them; local layers see those in their window.
        """
        B, _, T, _ = self.full.shape
        seen = jnp.broadcast_to(visible, (max(B, *np.shape(visible)[:1], 1), 1, T, length))
        near = seen
        if self.width is not None:
            distance = self.positions[:, None, :, None] - (first + jnp.arange(length))
            near = seen & ((distance if self.causal else jnp.abs(distance)) < self.width)
        full, local = (_beside(a, b) for a, b in ((seen, self.full), (near, self.local)))
        if bias is not None and self.bias is not None:
            bias = _beside(bias, self.bias)
        elif self.bias is not None:
            bias = jnp.pad(self.bias, [(0, 0)] * 3 + [(length, 0)])
        return dataclasses.replace(self, full=full, local=local, dense=True, prefix=self.prefix + length, bias=bias)


def _beside(a: jax.Array, b: jax.Array) -> jax.Array:
    """Both along the last axis, rows broadcast."""
    rows = max(a.shape[0], b.shape[0])
    return jnp.concatenate([jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (a, b)], axis=-1)


def make_mask(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    *,
    window: int | None,
    aligned: bool,
    common: bool = False,
    causal: bool = True,
) -> Mask:
    """Visibility within a segment, within `window` positions for local layers, and, where it is `causal`, by position.

    Positions and segments are [B, T] and [B, S]; the segment 0 is padding (and empty cache slots), and keys of the segment
    -1 are seen by all, which `common` has to announce.
    """
    distance = q_positions[:, None, :, None] - kv_positions[:, None, None, :]
    full = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if q_segments is not None and kv_segments is not None:
        kv = kv_segments[:, None, None, :]
        full &= (q_segments[:, None, :, None] == kv) | (kv < 0)
    width = window
    if window is not None and window >= kv_positions.shape[1]:
        window = None
    local = full if window is None else full & ((distance if causal else jnp.abs(distance)) < window)
    dense = common and q_segments is not None
    segments = q_segments if aligned else None
    return Mask(full, local, segments, window, aligned, q_positions, width, dense, causal=causal)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    sliding: bool | jax.Array = False,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention: q [B, T, H, d], k and v [B, S, K, d] -> [B, T, H, d] in q's dtype.

    `bias` [B or 1, H, T, S], float32, is added to the scores (relative positions). `sliding` chooses the mask's local part,
    statically or (in scanned layers that differ) by a traced boolean. `implementation` is "xla", "cudnn", "splash" or None
    for the best that applies. Softmax is in float32.
    """
    implementation = implementation or ("xla" if bias is not None else _best(q, mask, sliding, softcap))
    if bias is not None and implementation != "xla":
        raise ValueError(f"the {implementation} kernel has no relative positions; use xla")
    if implementation == "cudnn":
        return _cudnn(q, k, v, mask, sliding, scale)
    if implementation == "splash":
        window = mask.window if sliding is True else None
        if mask.dense or not mask.causal:
            raise ValueError("the splash kernel is causal, without prefixes and tokens that all segments see; use xla")
        return splash_attention(q, k, v, mask.segment_ids, window=window, scale=scale, softcap=softcap)
    if implementation != "xla":
        raise ValueError(f"unknown attention implementation {implementation!r}: use xla, cudnn or splash")
    return _xla(q, k, v, mask, sliding, scale, softcap, bias)


def _visible(mask: Mask, sliding: bool | jax.Array) -> jax.Array:
    if isinstance(sliding, bool):
        return mask.local if sliding else mask.full
    return jnp.where(sliding, mask.local, mask.full)


def _best(q: jax.Array, mask: Mask, sliding: bool | jax.Array, softcap: float | None) -> str:
    backend = jax.default_backend()
    if not mask.aligned or q.shape[1] == 1:
        return "xla"
    if backend == "gpu":
        fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        return "cudnn" if fits and softcap is None and mask.bias is None else "xla"
    if backend == "tpu" and mask.causal and not mask.dense and (isinstance(sliding, bool) or mask.window is None):
        return "splash" if splash_supports(q.shape) else "xla"
    return "xla"


def _cudnn(q, k, v, mask: Mask, sliding: bool | jax.Array, scale: float) -> jax.Array:
    plain = mask.causal and not mask.dense and mask.segment_ids is None and (mask.window is None or isinstance(sliding, bool))
    call = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    if plain:
        window = (mask.window - 1, 0) if sliding is True and mask.window else None
        return call(q, k, v, is_causal=True, local_window_size=window)
    return call(q, k, v, mask=_visible(mask, sliding))


def _xla(q, k, v, mask: Mask, sliding: bool | jax.Array, scale: float, softcap: float | None, relative=None) -> jax.Array:
    B, T, H, d = q.shape
    K = k.shape[2]
    if jax.default_backend() == "cpu":  # else rotary positions are computed again inside each block's products
        q, k, v = jax.lax.optimization_barrier((q, k, v))
    # Heads lead and a group's queries are stacked, so each (row, kv head) is one plain matrix product.
    q = jnp.moveaxis((q * scale).reshape(B, T, K, H // K, d), 1, 3)  # [B, K, G, T, d]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, d]
    bias = jnp.where(_visible(mask, sliding), 0.0, _MASKED)  # [B or 1, 1, T, S]
    if mask.bias is not None:
        bias = bias + jnp.pad(mask.bias, [(0, 0)] * 3 + [(0, k.shape[2] - mask.bias.shape[-1])])
    bias = bias[:, :, None]
    if relative is not None:
        bias = bias + relative.reshape(relative.shape[0], K, H // K, *relative.shape[2:])
    before = mask.prefix if mask.aligned and mask.causal else None
    return jnp.moveaxis(_blocked(softcap, before, q, k, v, bias), 3, 1).reshape(B, T, H, d)


def _blocks(T: int, S: int, before: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys): causal query blocks need only the keys before their end.

    `before` is the number of keys in front of those of the queries' tokens, None where keys are in another order.
    """
    size = max(64, -(-T // 8))  # at most 8 blocks, so that programs stay small
    if before is None or T % size:
        return [(0, T, S)]
    return [(start, start + size, before + start + size) for start in range(0, T, size)]


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, softcap: float | None) -> jax.Array:
    scores = _product("bkgtd,bksd->bkgts", q, k)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(softcap: float | None, before: int | None, q, k, v, bias) -> jax.Array:
    """Softmax attention by causal query blocks, keeping only the log-sum-exp for the backward pass.

    q [B, K, G, T, d]; k, v [B, K, S, d]; bias [B or 1, K or 1, G or 1, T, S]. The backward pass recomputes the weights of a
    block (Dao et al. 2022, arXiv:2205.14135, section 3), which is cheaper on a CPU than storing and rereading them.
    """
    return _blocked_forward(softcap, before, q, k, v, bias)[0]


def _blocked_forward(softcap, before, q, k, v, bias):
    outs, sums = [], []
    for start, end, keys in _blocks(q.shape[3], k.shape[2], before):
        scores = _scores(q[..., start:end, :], k[:, :, :keys], softcap) + bias[..., start:end, :keys]
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), v[:, :, :keys])
        outs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)
    return out, (q, k, v, bias, out, lse)


def _blocked_backward(softcap, before, saved, grad):
    q, k, v, bias, out, lse = saved
    delta = (grad.astype(jnp.float32) * out).sum(-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_bias = jnp.zeros((q.shape[0], *bias.shape[1:]), jnp.float32)  # costs nothing where it is not asked for
    shared = tuple(axis for axis in (1, 2) if bias.shape[axis] == 1)
    for start, end, keys in _blocks(q.shape[3], k.shape[2], before):
        q_block, grad_block, k_block = q[..., start:end, :], grad[..., start:end, :], k[:, :, :keys]
        scores = _scores(q_block, k_block, softcap)
        weights = jnp.exp(scores + bias[..., start:end, :keys] - lse[..., start:end, :])
        d_scores = weights * (_product("bkgtd,bksd->bkgts", grad_block, v[:, :, :keys]) - delta[..., start:end, :])
        d_bias = d_bias.at[..., start:end, :keys].add(d_scores.sum(shared, keepdims=True))
        if softcap is not None:
            d_scores *= 1 - jnp.square(scores / softcap)
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        dq.append(_product("bkgts,bksd->bkgtd", d_scores, k_block))
        dk = dk.at[:, :, :keys].add(_product("bkgts,bkgtd->bksd", d_scores, q_block))
        dv = dv.at[:, :, :keys].add(_product("bkgts,bkgtd->bksd", weights, grad_block))
    d_bias = d_bias if bias.shape[0] > 1 else d_bias.sum(0, keepdims=True)
    return jnp.concatenate(dq, 3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias


_blocked.defvjp(_blocked_forward, _blocked_backward)


CACHE_DTYPES: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}


def empty_cache(
    layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """A key/value cache of `length` slots: k and v [L, B, S, K, d]; positions and segments [B, S]; the next slot.

    In int8 and float8_e4m3fn each token's head has a scale of its own, k_scale and v_scale [L, B, S, K], bfloat16.
    """
    shape = (layers, batch, length, kv_heads, head_dim)
    scales = {}
    if jnp.dtype(dtype) in CACHE_DTYPES.values():
        scales = {name: jnp.zeros(shape[:-1], jnp.bfloat16) for name in ("k_scale", "v_scale")}
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        **scales,
        "positions": jnp.zeros((batch, length), jnp.int32),
        "segment_ids": jnp.zeros((batch, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def write_cache(cache: dict[str, jax.Array], k: jax.Array, v: jax.Array, index: Any) -> dict[str, jax.Array]:
    """One layer's cache with k and v [B, T, K, d] of new tokens in the slots from `index` on."""
    new = {}
    for name, x in (("k", k), ("v", v)):
        kind = cache[name].dtype
        if f"{name}_scale" in cache:
            largest = 127.0 if kind == jnp.int8 else float(jnp.finfo(kind).max)
            x = x.astype(jnp.float32)
            scale = (jnp.abs(x).max(-1) / largest).astype(jnp.bfloat16)
            new[f"{name}_scale"] = scale
            x = jnp.clip(x / jnp.maximum(scale.astype(jnp.float32), 1e-30)[..., None], -largest, largest)
            x = jnp.round(x) if kind == jnp.int8 else x
        new[name] = x.astype(kind)
    update = jax.lax.dynamic_update_slice_in_dim
    return {name: update(cache[name], value, index, axis=1) for name, value in new.items()}


def read_cache(cache: dict[str, jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """k and v [B, S, K, d] of one layer's cache in `dtype`."""

    def read(name: str) -> jax.Array:
        x = cache[name]
        if (scale := cache.get(f"{name}_scale")) is None:
            return x.astype(dtype)
        return (x.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]).astype(dtype)

    return read("k"), read("v")
