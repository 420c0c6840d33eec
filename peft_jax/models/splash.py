"""Splash attention: JAX's block-sparse flash kernel for TPUs, with grouped heads, windows, segments
and soft caps.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

_BLOCK = 128  # the kernel's lanes: head size and sequence length must be multiples


def splash_supports(shape: tuple[int, ...]) -> bool:
    """Whether queries of this shape [B, T, H, d] fit the kernel's tiles."""
    return shape[1] % _BLOCK == 0 and shape[-1] % _BLOCK == 0


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention with the splash kernel; shapes as in `attention`, segment_ids [B, T] or
    None.

    Under a mesh (`jax.set_mesh`) the batch is split over data and fsdp and the heads over tensor
    with `shard_map`, since a kernel call cannot be partitioned automatically.
    """
    run = functools.partial(
        _local, window=window, scale=scale, softcap=softcap, interpret=interpret
    )
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, segment_ids)
    batch = tuple(a for a in ("data", "fsdp") if a in mesh.axis_names) or None
    heads = "tensor" if "tensor" in mesh.axis_names else None
    spec = P(batch, None, heads, None)
    return jax.shard_map(
        run, in_specs=(spec, spec, spec, P(batch, None)), out_specs=spec, check_vma=False
    )(q, k, v, segment_ids)


def _local(
    q,
    k,
    v,
    segment_ids,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool,
):
    T, H = q.shape[1], q.shape[2]
    one = (
        masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    )
    run: Any = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * H),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def row(q, k, v, s):
        return run(q, k, v, kernel.SegmentIds(s, s))

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))  # heads first
    return jnp.swapaxes(jax.vmap(row)(q, k, v, segment_ids), 1, 2).astype(q.dtype)
