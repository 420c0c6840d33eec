"""Grouped einsums with a float32 softmax, in causal blocks of queries: what every other kernel is
held to, and what runs where none of them does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp

from peft_jax.models.attention.call import Call, Kernel
from peft_jax.models.attention.mask import Mask

_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


def _run(call: Call) -> jax.Array:
    q, k, v, mask = call.q, call.k, call.v, call.mask
    B, T, H, d = q.shape
    K = k.shape[2]
    if call.device.platform == "cpu":
        # else rotary positions are computed again inside each block's products
        q, k, v = jax.lax.optimization_barrier((q, k, v))
    # Heads lead and a group's queries are stacked, so each (row, kv head) is one plain matrix
    # product.
    q = jnp.moveaxis((q * call.scale).reshape(B, T, K, H // K, d), 1, 3)  # [B, K, G, T, d]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, d]
    bias = None if mask.bias is None else mask.bias[:, :, None]  # [B, 1, 1, T, prefix]
    relative = call.bias
    if relative is not None:
        bias = (
            jnp.zeros(())
            if bias is None
            else jnp.pad(bias, [(0, 0)] * 4 + [(0, k.shape[2] - bias.shape[-1])])
        )
        bias = bias + relative.reshape(relative.shape[0], K, H // K, *relative.shape[2:])
    before = mask.prefix if mask.aligned and mask.causal else None
    always = call.sliding if isinstance(call.sliding, bool) else None
    chosen = None if isinstance(call.sliding, bool) else call.sliding
    own = dataclasses.replace(mask, bias=None)
    out = _blocked(call.softcap, before, always, q, k, v, own, chosen, bias)
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


KERNEL = Kernel("xla", lacks=lambda call: None, run=_run)
