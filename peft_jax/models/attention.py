"""Attention through one function that picks the best implementation for the backend.

`attention` runs cuDNN's flash kernel on GPUs, the splash kernel on TPUs, and a grouped einsum with
a float32 softmax elsewhere or where a kernel does not apply (a soft cap on the GPU, single tokens,
odd shapes).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from peft_jax.models.splash import splash_attention, splash_supports

_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


@struct.dataclass
class Mask:
    """Who may look at whom, shared by all layers: what the boolean arrays are made of, block by
    block (`visible`), so that none of them is kept for the backward pass.

    `positions` [B or 1, T] and `segments` [B, T] are those of the queries, `kv_positions` and
    `kv_segments` those of the keys; segments are None without padding or packing. `width` is the
    window of the local layers, `window` the same where any key is further away. `aligned` says that
    queries and keys are the same tokens in order, which the kernels of GPUs and TPUs ask for. With
    `dense` it is the boolean arrays alone that say who is seen. `prefix` keys stand before the
    others (see `with_prefix`): `before` (for full and for local layers, [B or 1, 1, T, prefix])
    says who sees them, and `bias` [B or 1, 1, T, prefix] is added to their scores. `given` [B or 1,
    1, T, S], a pair too, replaces what positions and segments say of the other keys. Where it is
    not `causal`, tokens see those behind them too.
    """

    positions: jax.Array
    kv_positions: jax.Array
    segments: jax.Array | None
    kv_segments: jax.Array | None
    window: int | None = struct.field(pytree_node=False)
    width: int | None = struct.field(pytree_node=False)
    aligned: bool = struct.field(pytree_node=False)
    dense: bool = struct.field(pytree_node=False, default=False)
    causal: bool = struct.field(pytree_node=False, default=True)
    prefix: int = struct.field(pytree_node=False, default=0)
    before: tuple[jax.Array, jax.Array] | None = None
    bias: jax.Array | None = None
    given: tuple[jax.Array, jax.Array] | None = None

    @property
    def segment_ids(self) -> jax.Array | None:
        """The segments [B, T] of queries and keys where these are the same tokens."""
        return self.segments if self.aligned else None

    def visible(
        self, sliding: bool | jax.Array, queries: slice = slice(None), keys: int | None = None
    ) -> jax.Array:
        """Whether some of the queries see each of the first `keys` keys (all by default): bool [B
        or 1, 1, T, keys].

        `sliding` chooses what local layers see, statically or by a traced boolean.
        """
        own = None if keys is None else keys - self.prefix
        if isinstance(sliding, bool):
            return self._part(sliding, queries, own)
        return jnp.where(sliding, self._part(True, queries, own), self._part(False, queries, own))

    def _part(self, local: bool, queries: slice, keys: int | None) -> jax.Array:
        given = self.given
        seen = (
            self._near(local, queries, keys) if given is None else given[local][..., queries, :keys]
        )
        return seen if self.before is None else _beside(self.before[local][..., queries, :], seen)

    def _near(self, local: bool, queries: slice, keys: int | None) -> jax.Array:
        """What positions and segments say."""
        distance = self.positions[:, None, queries, None] - self.kv_positions[:, None, None, :keys]
        seen = distance >= 0 if self.causal else jnp.ones_like(distance, bool)
        if self.segments is not None and self.kv_segments is not None:
            kv = self.kv_segments[:, None, None, :keys]
            seen &= (self.segments[:, None, queries, None] == kv) | (kv < 0)
        if local and self.window is not None:
            seen &= (distance if self.causal else jnp.abs(distance)) < self.window
        return seen

    def with_prefix(
        self, length: int, visible: Any = True, bias: jax.Array | None = None, first: int = 0
    ) -> Mask:
        """The mask with `length` keys in front, at the positions first, first + 1, ..., which every
        segment sees.

        `visible` (a boolean that broadcasts to [B, 1, T, length]) hides them; local layers see
        those in their window.
        """
        shape = (1, 1, self.positions.shape[1], length)
        seen = near = jnp.broadcast_to(visible, np.broadcast_shapes(np.shape(visible), shape))
        if self.width is not None:
            distance = self.positions[:, None, :, None] - (first + jnp.arange(length))
            near = seen & ((distance if self.causal else jnp.abs(distance)) < self.width)
        before = (seen, near)
        if self.before is not None:
            before = (_beside(seen, self.before[0]), _beside(near, self.before[1]))
        if bias is not None and self.bias is not None:
            bias = _beside(bias, self.bias)
        elif self.bias is not None:
            bias = jnp.pad(self.bias, [(0, 0)] * 3 + [(length, 0)])
        return dataclasses.replace(
            self, dense=True, prefix=self.prefix + length, before=before, bias=bias
        )


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
    """Visibility within a segment, within `window` positions for local layers, and, where it is
    `causal`, by position.

    Positions and segments are [B, T] and [B, S]; the segment 0 is padding (and empty cache slots),
    and keys of the segment -1 are seen by all, which `common` has to announce.
    """
    width = window
    if window is not None and window >= kv_positions.shape[1]:
        window = None
    if q_segments is None or kv_segments is None:
        q_segments = kv_segments = None
    return Mask(
        q_positions,
        kv_positions,
        q_segments,
        kv_segments,
        window=window,
        width=width,
        aligned=aligned,
        dense=common and q_segments is not None,
        causal=causal,
    )


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

    `bias` [B or 1, H, T, S], float32, is added to the scores (relative positions). `sliding`
    chooses the mask's local part, statically or (in scanned layers that differ) by a traced
    boolean. `implementation` is "xla", "cudnn", "splash" or None for the best that applies. Softmax
    is in float32.
    """
    implementation = implementation or (
        "xla" if bias is not None else _best(q, mask, sliding, softcap)
    )
    if bias is not None and implementation != "xla":
        raise ValueError(f"the {implementation} kernel has no relative positions; use xla")
    if implementation == "cudnn":
        return _cudnn(q, k, v, mask, sliding, scale)
    if implementation == "splash":
        window = mask.window if sliding is True else None
        if mask.dense or not mask.causal:
            raise ValueError(
                "the splash kernel is causal, without prefixes and tokens that all segments "
                "see; use xla"
            )
        return splash_attention(
            q, k, v, mask.segment_ids, window=window, scale=scale, softcap=softcap
        )
    if implementation != "xla":
        raise ValueError(
            f"unknown attention implementation {implementation!r}: use xla, cudnn or splash"
        )
    return _xla(q, k, v, mask, sliding, scale, softcap, bias)


def _best(q: jax.Array, mask: Mask, sliding: bool | jax.Array, softcap: float | None) -> str:
    backend = jax.default_backend()
    if not mask.aligned or q.shape[1] == 1:
        return "xla"
    if backend == "gpu":
        fits = (
            q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        )
        return "cudnn" if fits and softcap is None and mask.bias is None else "xla"
    if (
        backend == "tpu"
        and mask.causal
        and not mask.dense
        and (isinstance(sliding, bool) or mask.window is None)
    ):
        return "splash" if splash_supports(q.shape) else "xla"
    return "xla"


def _cudnn(q, k, v, mask: Mask, sliding: bool | jax.Array, scale: float) -> jax.Array:
    plain = (
        mask.causal
        and not mask.dense
        and mask.segment_ids is None
        and (mask.window is None or isinstance(sliding, bool))
    )
    call = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    if plain:
        window = (mask.window - 1, 0) if sliding is True and mask.window else None
        return call(q, k, v, is_causal=True, local_window_size=window)
    if isinstance(sliding, bool):
        return call(q, k, v, mask=mask.visible(sliding))
    # The mask of a layer among others that differ is its own: it is made again, and the output with
    # it, where a gradient asks.
    masked = jax.checkpoint(
        lambda q, k, v, mask, sliding: call(q, k, v, mask=mask.visible(sliding))
    )
    return masked(q, k, v, mask, sliding)


def _xla(
    q,
    k,
    v,
    mask: Mask,
    sliding: bool | jax.Array,
    scale: float,
    softcap: float | None,
    relative=None,
) -> jax.Array:
    B, T, H, d = q.shape
    K = k.shape[2]
    if (
        jax.default_backend() == "cpu"
    ):  # else rotary positions are computed again inside each block's products
        q, k, v = jax.lax.optimization_barrier((q, k, v))
    # Heads lead and a group's queries are stacked, so each (row, kv head) is one plain matrix
    # product.
    q = jnp.moveaxis((q * scale).reshape(B, T, K, H // K, d), 1, 3)  # [B, K, G, T, d]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, d]
    bias = None if mask.bias is None else mask.bias[:, :, None]  # [B, 1, 1, T, prefix]
    if relative is not None:
        bias = (
            jnp.zeros(())
            if bias is None
            else jnp.pad(bias, [(0, 0)] * 4 + [(0, k.shape[2] - bias.shape[-1])])
        )
        bias = bias + relative.reshape(relative.shape[0], K, H // K, *relative.shape[2:])
    before = mask.prefix if mask.aligned and mask.causal else None
    always = sliding if isinstance(sliding, bool) else None
    chosen = None if isinstance(sliding, bool) else sliding
    out = _blocked(
        softcap, before, always, q, k, v, dataclasses.replace(mask, bias=None), chosen, bias
    )
    return jnp.moveaxis(cast("jax.Array", out), 3, 1).reshape(B, T, H, d)


def _blocks(T: int, S: int, before: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys): causal query blocks need only the keys before
    their end.

    `before` is the number of keys in front of those of the queries' tokens, None where keys are in
    another order.
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


def _shown(
    scores: jax.Array, visible: jax.Array, bias: jax.Array | None, queries: slice
) -> jax.Array:
    """A block's scores [B, K, G, t, s], biased and hidden where they are not `visible` [B or 1, 1,
    t, s].
    """
    if bias is not None:
        width = min(bias.shape[-1], scores.shape[-1])
        scores = scores.at[..., :width].add(bias[..., queries, :width])
    return jnp.where(visible[:, :, None], scores, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked(
    softcap: float | None,
    before: int | None,
    always: bool | None,
    q,
    k,
    v,
    mask: Mask,
    chosen: jax.Array | None,
    bias,
) -> jax.Array:
    """Softmax attention by causal query blocks, keeping only the log-sum-exp for the backward pass.

    q [B, K, G, T, d]; k, v [B, K, S, d]; bias [B or 1, K or 1, G or 1, T, S or fewer] of the first
    keys. The layer slides `always`, or as `chosen` says. The backward pass recomputes mask and
    weights of a block (Dao et al. 2022, arXiv:2205.14135, section 3), which is cheaper on a CPU
    than storing and rereading them.
    """
    return _blocked_forward(softcap, before, always, q, k, v, mask, chosen, bias)[0]


def _blocked_forward(softcap, before, always, q, k, v, mask, chosen, bias):
    outs, sums = [], []
    sliding = chosen if always is None else always
    for start, end, keys in _blocks(q.shape[3], k.shape[2], before):
        queries = slice(start, end)
        scores = _scores(q[..., queries, :], k[:, :, :keys], softcap)
        scores = _shown(scores, mask.visible(sliding, queries, keys), bias, queries)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), v[:, :, :keys])
        outs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)
    return out, (q, k, v, mask, chosen, bias, out, lse)


def _blocked_backward(softcap, before, always, saved, grad):
    q, k, v, mask, chosen, bias, out, lse = saved
    sliding = chosen if always is None else always
    delta = (grad.astype(jnp.float32) * out).sum(-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_bias = None if bias is None else jnp.zeros((q.shape[0], *bias.shape[1:]), jnp.float32)
    for start, end, keys in _blocks(q.shape[3], k.shape[2], before):
        queries = slice(start, end)
        q_block, grad_block, k_block = q[..., queries, :], grad[..., queries, :], k[:, :, :keys]
        scores = _scores(q_block, k_block, softcap)
        weights = jnp.exp(
            _shown(scores, mask.visible(sliding, queries, keys), bias, queries)
            - lse[..., queries, :]
        )
        d_scores = weights * (
            _product("bkgtd,bksd->bkgts", grad_block, v[:, :, :keys]) - delta[..., queries, :]
        )
        if d_bias is not None:
            d_bias = _add_bias(d_bias, d_scores, queries)
        if softcap is not None:
            d_scores *= 1 - jnp.square(scores / softcap)
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        dq.append(_product("bkgts,bksd->bkgtd", d_scores, k_block))
        dk = dk.at[:, :, :keys].add(_product("bkgts,bkgtd->bksd", d_scores, q_block))
        dv = dv.at[:, :, :keys].add(_product("bkgts,bkgtd->bksd", weights, grad_block))
    if bias is not None and d_bias is not None and bias.shape[0] == 1:
        d_bias = jnp.sum(d_bias, 0, keepdims=True)
    return (
        jnp.concatenate(dq, 3).astype(q.dtype),
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        None,
        None,
        d_bias,
    )


def _add_bias(total: jax.Array, d_scores: jax.Array, queries: slice) -> jax.Array:
    """The gradient of a bias with a block's part of it; axes that it shares are summed over."""
    shared = tuple(axis for axis in (1, 2) if total.shape[axis] == 1)
    width = min(total.shape[-1], d_scores.shape[-1])
    return total.at[..., queries, :width].add(d_scores[..., :width].sum(shared, keepdims=True))


_blocked.defvjp(_blocked_forward, _blocked_backward)
