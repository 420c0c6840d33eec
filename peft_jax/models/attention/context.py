"""Attention on a mesh: rows over `expert`, `data` and `fsdp`, heads over `tensor`, and the tokens
of long sequences over `sequence`.

Each device has the queries of its part of a sequence, and gathers the keys and values of all of it,
which are few where heads are grouped (Llama 3, Grattafiori et al. 2024, arXiv:2407.21783, section
3.3.2); their gradients are summed and scattered back. Under a causal mask later queries see more
keys. So that all devices have as much to do, each trades one half of its queries: of 2 n pieces the
device i of n works on the pieces i and 2 n - 1 - i.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.mesh import ROWS
from peft_jax.models.attention.call import Call, Kernel, Part
from peft_jax.models.attention.mask import Mask

TOKENS, HEADS = "sequence", "tensor"


class Layout(NamedTuple):
    """The axes of a mesh that rows, heads and tokens of a call lie on; None for one that has no
    such axis, or that does not divide them.
    """

    rows: tuple[str, ...] | None
    heads: str | None
    tokens: str | None


def layout_of(mesh: Any, q: jax.Array, mask: Mask) -> Layout:
    """How a call with queries [B, T, H, d] lies on the mesh."""
    B, T, H, _ = q.shape
    sizes = dict(mesh.shape) if mesh is not None else {}
    rows: list[str] = []
    for axis in ROWS:
        if sizes.get(axis, 1) > 1 and B % math.prod([sizes[axis], *(sizes[a] for a in rows)]) == 0:
            rows.append(axis)
    heads, tokens = sizes.get(HEADS, 1), sizes.get(TOKENS, 1)
    splits = tokens > 1 and mask.aligned and T % tokens == 0
    return Layout(
        tuple(rows) or None,
        HEADS if heads > 1 and H % heads == 0 else None,
        TOKENS if splits else None,
    )


def run_on_mesh(kernel: Kernel, call: Call, mesh: Any, layout: Layout) -> jax.Array:
    """The kernel on each device's rows, heads and part of the tokens."""
    k, v = call.k, call.v
    if layout.heads is not None:
        k, v = (_repeated(x, mesh.shape[layout.heads]) for x in (k, v))
    rows, heads, tokens = layout
    balanced = kernel.manual and call.mask.causal and call.window is None and tokens is not None
    balanced = balanced and call.q.shape[1] % (2 * call.shards) == 0
    prefix = call.mask.prefix
    ahead = (k[:, :prefix], v[:, :prefix])
    sliding = None if isinstance(call.sliding, bool) else call.sliding

    def local(q, k, v, ahead, mask, bias, sliding):
        own = dataclasses.replace(
            call,
            mask=mask,
            bias=bias,
            sliding=call.sliding if sliding is None else sliding,
        )
        if tokens is None:
            return kernel.run(dataclasses.replace(own, q=q, k=k, v=v))
        part = Part(jax.lax.axis_index(tokens), call.shards, balanced)
        k, v = (_whole(a, x, tokens) for a, x in zip(ahead, (k, v), strict=True))
        mask = dataclasses.replace(mask, aligned=False)
        if balanced:
            q = _spread(q, tokens, call.shards)
            if mask.segments is not None:
                mask = dataclasses.replace(
                    mask, segments=_spread(mask.segments, tokens, call.shards)
                )
        out = kernel.run(dataclasses.replace(own, q=q, k=k, v=v, mask=mask, part=part))
        return _collected(out, tokens, call.shards) if balanced else out

    spec = P(rows, tokens, heads, None)
    before = P(rows, None, heads, None)
    if tokens is not None:
        k, v = k[:, prefix:], v[:, prefix:]
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            spec,
            spec,
            spec,
            before,
            _mask_specs(call.mask, rows, tokens),
            None if call.bias is None else _over(call.bias, P(rows, heads, tokens, None)),
            P(),
        ),
        out_specs=spec,
        check_vma=False,
    )
    return run(call.q, k, v, ahead, call.mask, call.bias, sliding)


def _mask_specs(mask: Mask, rows: tuple[str, ...] | None, tokens: str | None) -> Mask:
    """What a device has of a mask: its queries' part, and all that is said of keys."""
    queries, keys, pairs = P(rows, tokens), P(rows, None), P(rows, None, tokens, None)

    def of(x: Any, spec: P) -> Any:
        return jax.tree.map(lambda y: _over(y, spec), x)

    return dataclasses.replace(
        mask,
        positions=of(mask.positions, queries),
        segments=of(mask.segments, queries),
        kv_positions=of(mask.kv_positions, keys),
        kv_segments=of(mask.kv_segments, keys),
        before=of(mask.before, pairs),
        bias=of(mask.bias, pairs),
        given=of(mask.given, pairs),
    )


def _over(x: jax.Array, spec: P) -> P:
    """The spec without the axes of what is the same for all, of which there is one."""
    return P(*(axis if n > 1 else None for n, axis in zip(x.shape, spec, strict=True)))


def _repeated(x: jax.Array, devices: int) -> jax.Array:
    """Keys or values [B, S, K, d] with each head so often that the `devices` have whole ones."""
    return jnp.repeat(x, math.lcm(x.shape[2], devices) // x.shape[2], axis=2)


def _whole(ahead: jax.Array, x: jax.Array, axis: str) -> jax.Array:
    """The keys or values of all devices' tokens, behind those of a prefix."""
    return jnp.concatenate([ahead, jax.lax.all_gather(x, axis, axis=1, tiled=True)], axis=1)


def _home(piece: int, devices: int) -> int:
    """The device that works on one of the 2 `devices` pieces of a sequence."""
    return piece if piece < devices else 2 * devices - 1 - piece


def _spread(x: jax.Array, axis: str, devices: int) -> jax.Array:
    """A device's pieces i and 2 n - 1 - i along the axis 1, of which it had 2 i and 2 i + 1."""
    low, high = jnp.split(x, 2, axis=1)
    even = jax.lax.ppermute(low, axis, [(i, _home(2 * i, devices)) for i in range(devices)])
    odd = jax.lax.ppermute(high, axis, [(i, _home(2 * i + 1, devices)) for i in range(devices)])
    return _ordered(even, odd, axis)


def _collected(x: jax.Array, axis: str, devices: int) -> jax.Array:
    """The inverse of `_spread`."""
    first, second = jnp.split(x, 2, axis=1)
    even, odd = jnp.split(_ordered(first, second, axis), 2, axis=1)
    low = jax.lax.ppermute(even, axis, [(_home(2 * i, devices), i) for i in range(devices)])
    high = jax.lax.ppermute(odd, axis, [(_home(2 * i + 1, devices), i) for i in range(devices)])
    return jnp.concatenate([low, high], axis=1)


def _ordered(even: jax.Array, odd: jax.Array, axis: str) -> jax.Array:
    """A device's even and odd piece, as they are on devices of even numbers and turned round on
    others.
    """
    is_even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis=1)
