"""Splash attention: JAX's block-sparse flash kernel for TPUs, with grouped heads, windows, segments
and soft caps.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from peft_jax.models.attention.call import Call, Kernel, Part

LANES = 128  # tokens come in multiples of it
# Tokens of a tile. Compiled for a v5e, scores of 512 x 512 cost 8,700 instructions forward and
# 14,700 backward in tiles of 128, 2,000 and 4,400 in those of 512, 1,600 and 3,600 in those of
# 1,024, which waste more on the diagonal and on windows and take longer to compile.
TILES = (512, 384, 256, 128)
LONG = 8192  # queries from which tiles have 1,024
LEAST = 128  # queries below which XLA's products are as good
_PADDING = -2  # a segment of its own: no token is of it


def splash_supports(shape: tuple[int, ...]) -> bool:
    """Whether queries of this shape [B, T, H, d] fill the kernel's tiles."""
    return shape[1] >= LEAST


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | jax.Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    causal: bool = True,
    part: Part | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention with the splash kernel; shapes as in `attention`, segments [B, T] of the tokens, or
    those of queries and of keys, or None.

    Heads of any size are left as they are: one of 64 features padded to 128 takes a quarter more
    time and bytes outside of the kernel, by the compiler's estimate, and saves a twentieth inside.
    Of a `part` the queries are those of one device (see `Part`), and its tokens a multiple of 128.
    """
    if segments is not None and not isinstance(segments, tuple):
        segments = (segments, segments)
    T, S, H = q.shape[1], k.shape[1], q.shape[2]
    more = 0 if part is not None else _length(T) - T
    if more:
        if segments is None and not causal:
            ones = jnp.ones(q.shape[:2], jnp.int32)
            segments = (ones, ones)
        q, k, v = (jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]) for x in (q, k, v))
        if segments is not None:
            ends = [(0, 0), (0, more)]
            own, other = (jnp.pad(s, ends, constant_values=_PADDING) for s in segments)
            segments = (own, other)
    run = _kernel(T + more, S + more, H, window, causal, softcap, part, interpret)

    def row(q, k, v, segments):
        return run(q, k, v, None if segments is None else kernel.SegmentIds(*segments))

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))  # heads first
    out = jnp.swapaxes(jax.vmap(row)(q, k, v, segments), 1, 2).astype(v.dtype)
    return out[:, :T]


def _length(T: int) -> int:
    """`T` tokens and as many as fill the last tile."""
    full = TILES[0]
    return -(-T // full) * full if full < T else -(-T // LANES) * LANES


def _tile(T: int, S: int, window: int | None) -> int:
    """The tokens of a tile of `T` queries and `S` keys."""
    if window is None and T >= LONG and T % (2 * TILES[0]) == 0:
        return 2 * TILES[0]
    return next(n for n in TILES if T % n == 0 and S % n == 0)


class _Band(masks.LocalMask):
    """Keys at most `window` positions behind their query, and none after it where it is `causal`.

    The kernel computes the mask of a tile by itself. Here it is only asked which tiles have a part
    of the mask and which are full, 65,536 times for 131,072 tokens: a tile is summed up by [full,
    not empty], which has the same `any()` and `all()`.
    """

    def __init__(self, S: int, window: int | None, causal: bool, order: np.ndarray | None) -> None:
        far = None if window is None else window - 1
        super().__init__((S, S), (far, 0 if causal else far), 0)
        if order is not None:
            self.q_sequence = order

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        rows, keys = self.q_sequence[idx[0]], idx[1]
        nearest, farthest = rows.min() - (keys.stop - 1), rows.max() - keys.start
        left, right = (math.inf if n is None else n for n in self.window_size)
        full = nearest >= -right and farthest <= left
        return np.array([[full, nearest <= left and farthest >= -right]])


def _kernel(
    T: int,
    S: int,
    H: int,
    window: int | None,
    causal: bool,
    softcap: float | None,
    part: Part | None,
    interpret: bool,
) -> Any:
    """The kernel of `T` queries and `S` keys; that of the whole sequence cut to a `part`."""
    order = balanced_order(S, part.count) if part is not None and part.balanced else None
    one = _Band(S, window, causal, order) if causal or window else masks.FullMask((S, S))
    tile = _tile(T, S, window)
    count = 1 if part is None else part.count
    whole = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * H),
        head_shards=1,
        q_seq_shards=count,
        block_sizes=_tiles(tile),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    return whole if part is None else jax.tree.map(lambda x: _cut(x, part), whole)


def _tiles(size: int) -> kernel.BlockSizes:
    """Tiles of `size` tokens everywhere."""
    return kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def balanced_order(T: int, count: int) -> np.ndarray:
    """Which token stands where once each of `count` devices has the pieces i and 2 count - 1 - i of
    a sequence of `T`.
    """
    pieces = np.arange(T, dtype=np.int32).reshape(2 * count, -1)
    return np.concatenate([pieces[[i, 2 * count - 1 - i]].reshape(-1) for i in range(count)])


def _cut(x: jax.Array, part: Part) -> jax.Array:
    """What concerns a part's queries of one of the kernel's tables: [heads, blocks of queries,
    blocks of keys], or positions of queries.
    """
    axis = 0 if x.ndim == 1 else 1
    size = x.shape[axis] // part.count
    return jax.lax.dynamic_slice_in_dim(x, part.index * size, size, axis)


def _lacks(call: Call) -> str | None:
    mask = call.mask
    if not mask.aligned:
        return "caches, nor queries and keys of different tokens"
    if call.bias is not None or mask.bias is not None:
        return "relative positions, nor other biases of scores"
    if mask.prefix:
        return "keys of a prefix"
    if mask.dense:
        return "masks given as arrays, nor tokens that all segments see"
    if not call.static:
        return "layers whose window is only known at run time (load with scan_layers=False)"
    if call.shards > 1 and (call.q.shape[1] // call.shards) % LANES:
        return f"parts of a sequence that are no multiple of {LANES} tokens"
    return None


def _run(call: Call) -> jax.Array:
    mask = call.mask
    segments = None
    if mask.segments is not None and mask.kv_segments is not None:
        segments = (mask.segments, mask.kv_segments)
    return splash_attention(
        call.q,
        call.k,
        call.v,
        segments,
        window=call.window,
        scale=call.scale,
        softcap=call.softcap,
        causal=mask.causal,
        part=call.part,
        interpret=call.device.platform == "cpu",
    )


KERNEL = Kernel("splash", _lacks, _run, platform="tpu", least=LEAST, manual=True)
