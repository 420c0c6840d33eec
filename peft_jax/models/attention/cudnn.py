"""cuDNN's flash attention for GPUs, through JAX: causal and whole sequences, windows, packed rows
by the offsets of their segments (Hopper and later), and whatever else as a mask.

A mask is made by blocks of queries that see only the keys before their end, so that none of
[T, T] is ever whole and most of what a causal mask hides is skipped.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.devices import Device
from peft_jax.models.attention.call import Call, Kernel
from peft_jax.models.attention.mask import Mask

DTYPES = (jnp.bfloat16, jnp.float16)
HOPPER = (9, 0)  # compute capability
_HOPPER_AND_LATER = r"\b(H100|H200|H800|H20|GH200|B100|B200|B300|GB200|GB300)\b"
_BLOCK = 1024  # queries of the smallest masked block


def _lacks(call: Call) -> str | None:
    size, most = call.q.shape[-1], 256 if _is_hopper(call.device) else 128
    if call.softcap is not None:
        return "soft caps"
    if call.bias is not None or call.mask.bias is not None:
        return "relative positions, nor other biases of scores"
    if call.q.dtype not in DTYPES:
        return f"{call.q.dtype} (it computes in bfloat16 and float16)"
    if size > most or size % 8:
        return f"heads of {size} features (on these devices multiples of 8 up to {most})"
    odd = call.q.shape[1] % 2 or call.k.shape[1] % 2
    if odd and call.mask.aligned and (call.mask.segments is not None or not _by_rule(call)):
        return "masks of an odd number of queries or keys"
    return None


def _is_hopper(device: Device) -> bool:
    """Whether the GPU's compute capability is 9.0 or more, by itself if it is here, by its name if
    not.
    """
    if device.platform != "gpu":
        return False
    for local in jax.local_devices():
        capability = getattr(local, "compute_capability", None)
        if local.device_kind == device.kind and capability is not None:
            return tuple(int(n) for n in str(capability).split(".")) >= HOPPER
    return re.search(_HOPPER_AND_LATER, device.kind) is not None


def _by_rule(call: Call) -> bool:
    """Whether the kernel's own rules (causal, a window) say who sees whom within a segment."""
    mask = call.mask
    own = mask.aligned and not mask.dense and call.static
    return own and (mask.causal or call.window is None)


def _run(call: Call) -> jax.Array:
    mask = call.mask
    if not _by_rule(call):
        return _masked(call)
    if mask.segments is None:
        window = None if call.window is None else (call.window - 1, 0)
        return _attend(call)(
            call.q, call.k, call.v, is_causal=mask.causal, local_window_size=window
        )
    return _packed(call, mask.segments) if _is_hopper(call.device) else _masked(call)


def _attend(call: Call) -> Any:
    return functools.partial(jax.nn.dot_product_attention, scale=call.scale, implementation="cudnn")


def _masked(call: Call, again: bool = False) -> jax.Array:
    """Attention under boolean masks, made block by block.

    The mask of a block is made again, and its output with it, where a gradient asks: that of a
    layer among others that differ is its own. Layers alike share the one of a single block, unless
    `again` says otherwise.
    """
    static = isinstance(call.sliding, bool)
    blocks = _blocks(call)

    def block(start: int, end: int, keys: int, q: Any, k: Any, v: Any, mask: Mask, chosen: Any):
        queries, sliding = slice(start, end), call.sliding if static else chosen
        seen = mask.visible(sliding, queries, keys)
        return _attend(call)(q[:, queries], k[:, :keys], v[:, :keys], mask=seen)

    if again or len(blocks) > 1 or not static:
        block = jax.checkpoint(block, static_argnums=(0, 1, 2))
    operands = (call.q, call.k, call.v, call.mask, None if static else call.sliding)
    return jnp.concatenate([block(*where, *operands) for where in blocks], axis=1)


def _blocks(call: Call) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys), at most 8 so that programs stay small."""
    T, S, mask = call.q.shape[1], call.k.shape[1], call.mask
    size = max(_BLOCK, -(-T // 8))
    if T % size:
        return [(0, T, S)]
    early = mask.aligned and mask.causal
    ends = range(size, T + 1, size)
    return [(end - size, end, mask.prefix + end if early else S) for end in ends]


def _packed(call: Call, segments: jax.Array) -> jax.Array:
    """Rows packed from several sequences, each of which is one to the kernel.

    How many a row has is known at run time alone, and the kernel's statistics [B, runs, H, T] ask
    for a number: where a row has more runs than `_most_runs`, masks say who sees whom.
    """
    most = _most_runs(call.q.shape[1])
    starts, lengths, count = runs_of(segments, most)

    def by_offsets(_: Any) -> jax.Array:
        return _attend_runs(call, starts, lengths)

    if most >= call.q.shape[1]:
        return by_offsets(None)
    return jax.lax.cond(count.max() <= most, by_offsets, lambda _: _masked(call, True), None)


def _most_runs(T: int) -> int:
    return min(T, max(8, min(128, T // 128)))


def runs_of(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stretches of equal segments [B, T] of each row, padding being one too: their first tokens
    [B, most + 1] and lengths [B, most], -1 behind the last one, and how many there are [B].
    """
    T = segments.shape[1]
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    at = jnp.where(first, jnp.arange(T, dtype=jnp.int32), T)
    ends = jnp.pad(jnp.sort(at, axis=1), [(0, 0), (0, 2)], constant_values=T)[:, : most + 2]
    starts, lengths = ends[:, :-1], ends[:, 1:] - ends[:, :-1]
    starts, lengths = (jnp.where(starts < T, x, -1) for x in (starts, lengths))
    return starts, lengths[:, :-1], first.sum(axis=1)


def _attend_runs(call: Call, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    # JAX's public function has no offsets yet.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    # Each query's head has its own keys: JAX counts the offsets of keys by heads of queries.
    k, v = (jnp.repeat(x, call.q.shape[2] // x.shape[2], axis=2) for x in (call.k, call.v))
    attend: Any = dot_product_attention
    return attend(
        call.q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=call.scale,
        mask_type=MaskType.PADDING_CAUSAL if call.mask.causal else MaskType.PADDING,
        sliding_window_length=call.window,
    )


KERNEL = Kernel("cudnn", _lacks, _run, platform="gpu", least=2)
