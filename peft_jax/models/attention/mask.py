"""Who may look at whom: what the kernels are told of positions, segments, windows and prefixes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


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
